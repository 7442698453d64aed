"""Compress a model that is in memory: the same stages as a run directory's, and the same bits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dernkit.api import Block
from dernkit.errors import RecipeError
from dernkit.models.export import check_export
from dernkit.models.groups import regrouped
from dernkit.models.quantised import refuse_quantised
from dernkit.models.stack import find_blocks
from dernkit.progress import Progress, Silent
from dernkit.recipe import Recipe, bind_recipe, load_recipe
from dernkit.registry import Registry
from dernkit.stages import sequential
from dernkit.stages.apply import Seen, apply_live, check_new_width
from dernkit.stages.calibrate import Live, calibrate_live, eager_experts
from dernkit.stages.plan import plan_blocks
from dernkit.types import LayerPlan, LayerStats


def compress(
    model: Any,
    recipe: Recipe | Mapping[str, Any] | Path | str,
    batches: Iterable[Tensor] = (),
    *,
    registry: Registry | None = None,
    progress: Progress | None = None,
) -> list[LayerPlan]:
    """Compress a loaded ``PreTrainedModel`` in place, config included; ``model.save_pretrained`` then works as usual.

    Where layers keep different numbers of experts and `apply.export` does not pad them, what it saves is for
    `dernkit.load_model`: its config has a field ``dernkit_experts``, and transformers refuses to load it.

    Args:
        model: a causal language model of a family that an adapter knows, weights in float32, bfloat16 or float16.
        recipe: a bound recipe, plain data, or the path of a recipe file. Its ``calibrate.source`` and ``evaluate`` are
            not used: calibration tokens are ``batches``.
        batches: token ids [b, s], int64, full sequences without padding. May be empty if the recipe reads no
            statistics.
        registry: where components come from; the installed ones by default.
        progress: silent by default.

    Returns:
        The plan of every MoE layer.

    Raises:
        DernkitError: with one sentence; the model is then unchanged, but for what a component of a plugin may have
            written into its weights (which is such an error, where it is seen).
    """
    registry = registry or Registry.load()
    with registry.naming_plugins():
        return compress_bound(model, _bound(recipe, registry), list(batches), registry, progress or Silent())


def compress_bound(
    model: Any,
    bound: Recipe,
    tokens: Sequence[Tensor],
    registry: Registry,
    progress: Progress,
    *,
    given: Mapping[int, LayerStats] | None = None,
    requires: frozenset[str] = frozenset(),
    seen: Seen | None = None,
) -> list[LayerPlan]:
    """As `compress`, of a bound recipe.

    Args:
        model: as there.
        bound: the recipe.
        tokens: calibration batches [b, s].
        registry: as there.
        progress: as there.
        given: statistics that were collected on the tokens before, for a recipe that is not sequential.
        requires: statistics to collect beside those that the recipe reads.
        seen: as for `apply_live`.
    """
    refuse_quantised(model)
    blocks = find_blocks(model, [component.cls() for component in registry.components("adapter")])
    blocks = regrouped(model, blocks, collapse=bound.plan.groups == "collapse")
    check_new_width(blocks, bound.apply.width)
    check_export(blocks, bound.apply.export)
    for block in blocks:
        block.router_kind()  # runs the router: one that does not do what its shapes say is refused here
    if bound.requires and not tokens and given is None:
        raise RecipeError(
            f"batches: must hold calibration tokens, as the recipe reads {', '.join(sorted(bound.requires))}. "
            f"Got none instead."
        )
    stats, plans = _decided(model, blocks, tokens, bound, progress, given, requires)
    how = bound.apply
    apply_live(
        model,
        blocks,
        plans,
        how.merge,
        how.router,
        seed=bound.seed,
        width=how.width,
        export=how.export,
        stats=stats,
        refit=how.refit,
        seen=seen,
    )
    return plans


def _decided(
    model: Any,
    blocks: Sequence[Block],
    tokens: Sequence[Tensor],
    bound: Recipe,
    progress: Progress,
    given: Mapping[int, LayerStats] | None,
    requires: frozenset[str],
) -> tuple[Mapping[int, LayerStats], list[LayerPlan]]:
    """Statistics of every MoE layer, and its plan; the model stays as it is."""
    stats = given or {}
    requires |= bound.requires
    if requires and bound.calibrate and (given is None or bound.calibrate.sequential):
        held_out = bound.calibrate.held_out(sum(batch.numel() for batch in tokens))
        sizes: Any = {"sample_size": bound.calibrate.sample, "seed": bound.seed, "held_out": held_out}
        sizes["progress"] = progress
        if bound.calibrate.sequential:
            return sequential.calibrate_live(model, blocks, tokens, requires, bound.plan, bound.apply, **sizes)
        stats = calibrate_live(model, blocks, tokens, requires, **sizes)
    with eager_experts(model):
        return stats, plan_blocks(blocks, bound.plan, stats, Live(), progress)


def _bound(recipe: Recipe | Mapping[str, Any] | Path | str, registry: Registry) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Mapping):
        return bind_recipe(recipe, registry)
    return load_recipe(Path(recipe), registry)
