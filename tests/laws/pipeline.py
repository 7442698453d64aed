"""What the law tests share: a recipe on a checkpoint through the stages, without a tokenizer or a run directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from dernkit.models.source import SourceModel, open_source
from dernkit.models.universal import Universal
from dernkit.progress import Silent
from dernkit.recipe import Recipe, bind_recipe
from dernkit.registry import Registry
from dernkit.stages.apply import apply_checkpoint
from dernkit.stages.calibrate import batched, calibrate_checkpoint
from dernkit.stages.plan import plan_checkpoint
from dernkit.types import LayerPlan

DERN = {"use": "affinity", "similarity": {"use": "cosine"}}
TOKENS = 64


def recipe(
    registry: Registry,
    *,
    keep: float | int = 0.5,
    score: str = "gate-mass",
    assign: dict[str, Any] | None = None,
    merge: str = "spherical-kmeans",
    router: str = "slice",
    groups: str = "respect",
    mtp: str = "compress",
    width: int | None = None,
    export: str = "auto",
) -> Recipe:
    """A bound recipe; its source is never read."""
    data: dict[str, Any] = {
        "dernkit": 1,
        "calibrate": {"source": {"use": "text-file", "path": "unused.txt"}, "sequences": 4, "length": 16},
        "plan": {"keep": keep, "score": {"use": score}, "groups": groups},
        "apply": {"router": {"use": router}, "width": width, "mtp": mtp, "export": export},
    }
    if assign is not None:
        data["plan"]["assign"] = assign
        data["apply"]["merge"] = {"use": merge}
    return bind_recipe(data, registry)


def source(folder: Path) -> SourceModel:
    """The checkpoint, through the built-in adapter."""
    return open_source(folder, [Universal()])


def run(folder: Path, out: Path, bound: Recipe, tokens: torch.Tensor) -> list[LayerPlan]:
    """Calibrate, plan and apply from ``folder`` to ``out``."""
    model = source(folder)
    stats = calibrate_checkpoint(
        model,
        batched(tokens, 2),
        bound.requires | {"routed"},
        sample_size=TOKENS,
        seed=bound.seed,
        progress=Silent(),
    )
    plans = plan_checkpoint(model, bound.plan, stats, Silent())
    carry_out(model, plans, bound, out)
    return plans


def carry_out(model: SourceModel, plans: list[LayerPlan], bound: Recipe, out: Path) -> None:
    """Apply plans that are made."""
    out.mkdir(exist_ok=True)
    apply_checkpoint(
        model,
        plans,
        bound.apply.merge,
        bound.apply.router,
        seed=bound.seed,
        folder=out,
        key="test",
        progress=Silent(),
        width=bound.apply.width,
        mtp=bound.apply.mtp,
        export=bound.apply.export,
    )


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of all shards."""
    loaded: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded |= load_file(file)
    return loaded
