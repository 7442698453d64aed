"""Compress Mixture-of-Experts checkpoints in one shot: drop experts, recombine neurons.

``compress`` works on a model in memory; the command ``dernkit run`` works from disk to disk. Both run the same code.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dernkit.compression import compress
    from dernkit.models.architecture import register_architectures
    from dernkit.models.loading import load_model
    from dernkit.recipe import bind_recipe, load_recipe
    from dernkit.registry import Registry

__all__ = ["Registry", "bind_recipe", "compress", "load_model", "load_recipe", "register_architectures"]

_HOMES = {
    "Registry": "dernkit.registry",
    "bind_recipe": "dernkit.recipe",
    "compress": "dernkit.compression",
    "load_model": "dernkit.models.loading",
    "load_recipe": "dernkit.recipe",
    "register_architectures": "dernkit.models.architecture",
}


def __getattr__(name: str) -> Any:
    """Import torch and transformers when they are first needed, not with the package."""
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dernkit' has no attribute '{name}'")
