"""For tests of components: the conformance kit, and small random layers, checkpoints and runs to test on.

==================  ================================================================================
`kit`               the laws as tests: ``parametrize_with_checks``; `dernkit check` runs the same ones
`laws`              the laws themselves, by kind
`cases`, `trials`   the layers and the calls on which they are checked
`banks`             random experts, statistics and pools, and the same in another order
`checkpoints`       tiny models, in memory and on disk; `quantised` quantises them
==================  ================================================================================
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dernkit.testing.kit import all_checks, checks_of, parametrize_with_checks

__all__ = ["all_checks", "checks_of", "parametrize_with_checks"]


def __getattr__(name: str) -> Any:
    """Import the kit when it is first asked for: checkpoints and banks do not need it."""
    if name in __all__:
        from dernkit.testing import kit

        return getattr(kit, name)
    raise AttributeError(f"module 'dernkit.testing' has no attribute '{name}'")
