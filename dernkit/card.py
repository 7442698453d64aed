"""The model card that travels with a compressed checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from dernkit.models.export import Export
from dernkit.models.folder import SOURCE_CARD
from dernkit.types import LayerPlan

if TYPE_CHECKING:
    from dernkit.recipe import Recipe


def render(
    model: str,
    recipe: Recipe,
    plans: Sequence[LayerPlan],
    result: Export,
    *,
    mtp: bool = False,
    quantisation: str | None = None,
) -> str:
    """README.md of the output: what it was made from, how, and which experts it has; no time and no path.

    Args:
        model: what the user called the source.
        recipe: how it was made.
        plans: of all layers.
        result: how it was written.
        mtp: whether the source has multi-token-prediction layers.
        quantisation: how the source is quantised.
    """
    name = Path(model).resolve().name if Path(model).exists() else model
    text = yaml.safe_dump(_without_paths(recipe.resolved()), sort_keys=False, width=100, default_flow_style=None)
    done = {"compress": f"use the plan of layer {plans[-1].layer}", "drop": "are left out"}[recipe.apply.mtp]
    extra = f"\nIts multi-token-prediction layers {done}.\n" if mtp else ""
    if quantisation:
        extra += f"\nThe source is quantised ({quantisation}). It was read as bf16, and these weights are bf16.\n"
    kept = "\n".join(f"| {plan.layer} | {', '.join(map(str, plan.kept.tolist()))} |" for plan in plans)
    library = "dernkit" if result.kind == "dernkit" else "transformers"
    return f"""---
library_name: {library}
tags: [mixture-of-experts, dernkit, expert-pruning]
---
# {name}, {result.spread} of {plans[0].experts} experts

{result.sentence()}

Made from `{name}` by dernkit {metadata.version("dernkit")} without training:
every MoE layer keeps {result.spread} of {plans[0].experts} experts. The source's licence applies; its own card, if it
has one, is `{SOURCE_CARD}`.
{extra}
| layer | kept experts (their indices in the source) |
|---|---|
{kept}

```yaml
{text.rstrip()}
```
"""


def _without_paths(value: object) -> object:
    """Paths of the machine that made the model say nothing to those who load it: only file names stay."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    return value.rpartition("/")[2] if isinstance(value, str) and "/" in value else value
