"""One calibration, many ratios: every layer is planned and compressed for each of them while it is in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dernkit.api import Block
from dernkit.errors import CheckpointError, RecipeError
from dernkit.given import check_given
from dernkit.kernel.compress import NO_STATISTICS, compress_layer, target_width
from dernkit.kernel.layer_error import layer_error
from dernkit.kernel.selection import limits
from dernkit.kernel.statistics import Reader
from dernkit.models.export import check_export
from dernkit.models.groups import regrouped
from dernkit.models.source import SourceModel
from dernkit.progress import Progress
from dernkit.recipe import Recipe
from dernkit.run import calibration_batches, refuse_missing
from dernkit.stages.apply import check_new_width
from dernkit.stages.calibrate import calibrate_checkpoint, load_stats
from dernkit.stages.plan import allocate, check_keep, decide, score_blocks
from dernkit.stages.results import result_bytes
from dernkit.types import Assignment, LayerPlan, LayerStats

MOST = 8
"""Ratios of a sweep that names none."""
TOKENS = 4096
"""Sampled inputs on which errors are taken, at most."""


@dataclass(frozen=True, slots=True)
class Ratio:
    """What becomes of a model at one ratio."""

    keep: int | float
    """As it was asked for: a fraction or a count."""
    counts: tuple[int, ...]
    """Experts that each MoE layer keeps."""
    share: float
    """Of all routed experts, those that stay."""
    bytes: int
    """Of all tensors of the result."""
    errors: tuple[float | None, ...]
    """`layer_error` of each MoE layer; None where tokens cannot be routed again."""

    @property
    def known(self) -> list[float]:
        """The errors of the layers that have one."""
        return [error for error in self.errors if error is not None]

    @property
    def mean(self) -> float | None:
        """Mean of the layers' errors."""
        return sum(self.known) / len(self.known) if self.known else None


def ratios(source: SourceModel, groups: str) -> list[int]:
    """All counts below that of the model that its routers allow, most first; evenly thinned to `MOST`.

    Raises:
        CheckpointError: there is none.
    """
    store, blocks = source.outline
    bounds = [limits(block.dims) for block in regrouped(store.model, blocks, collapse=groups == "collapse")]
    legal = [
        {count for count in range(bound.smallest, bound.experts) if count % bound.multiple == 0} for bound in bounds
    ]
    counts = sorted(set.intersection(*legal), reverse=True)
    if not counts:
        raise CheckpointError(
            f"{source.path}: routers must allow fewer experts than there are. Got {bounds[0].experts} experts of which "
            f"a token needs {bounds[0].smallest} instead. There is nothing to profile."
        )
    places = np.linspace(0, len(counts) - 1, min(MOST, len(counts)))
    return [counts[int(place)] for place in places.round()]


def check(source: SourceModel, recipe: Recipe, keeps: Sequence[int | float]) -> None:
    """Refuse what cannot be done before anything expensive starts."""
    for keep in keeps:
        check_keep(source, replace(recipe.plan, keep=keep))
    check_new_width(source.outline[1], recipe.apply.width)
    check_export(source.outline[1], recipe.apply.export)


def statistics(
    source: SourceModel,
    recipe: Recipe,
    given: Path | None,
    readers: Sequence[Reader],
    command: str,
    progress: Progress,
) -> dict[int, LayerStats]:
    """All that the recipe's components read, and the sample on which errors are taken.

    Args:
        source: the model.
        recipe: its ``calibrate`` section is used unless statistics are ``given``.
        given: the `stats.safetensors` of a run with this model.
        readers: the recipe's components that read statistics.
        command: what to type to have those that are lacking collected.
        progress: where to report.

    Raises:
        RecipeError: there are no tokens, or each layer is to be calibrated on compressed ones.
        CheckpointError: given statistics are of another model, or lack something.
    """
    spec = recipe.calibrate
    if spec is not None and spec.sequential:
        raise RecipeError(
            "calibrate.sequential: must be false to profile, as one calibration is for all ratios. Got true instead. "
            "Add --set calibrate.sequential=false."
        )
    if given is not None:
        check_given(given, source.fingerprint(), [*readers, ("command", "profile", frozenset({"sample"}))], command)
        return load_stats(given)
    if spec is None:
        raise RecipeError(
            "calibrate: must be given to profile, which looks at what experts make of tokens. Got nothing instead. "
            "Add the section, or name statistics of another run with --statistics."
        )
    refuse_missing("calibrate.source", spec.source)
    batches, requires = calibration_batches(source, spec, recipe.seed), recipe.requires | {"sample"}
    return calibrate_checkpoint(source, batches, requires, sample_size=spec.sample, seed=recipe.seed, progress=progress)


def sweep(
    source: SourceModel,
    recipe: Recipe,
    keeps: Sequence[int | float],
    stats: Mapping[int, LayerStats],
    progress: Progress,
) -> list[Ratio]:
    """Every ratio in the order given; one layer's weights in memory, and of its plans one at a time."""
    how = recipe.plan
    store, blocks = source.open(keep_dtypes=True)
    blocks = regrouped(store.model, blocks, collapse=how.groups == "collapse")
    with progress.track("profile", (1 + len(keeps)) * len(blocks), "layers") as tracker:
        scores, measures = score_blocks(blocks, how, stats, store, tracker)
        counts = [allocate(blocks, replace(how, keep=keep), measures) for keep in keeps]
        found: list[list[_Layer]] = [[] for _ in keeps]
        for position, block in enumerate(blocks):
            store.load(block.path)
            for ratio, layers in zip(counts, found, strict=True):
                plan = decide(block, how, stats, scores[position], ratio[position])
                layers.append(_measured(block, plan, recipe, stats.get(block.layer, NO_STATISTICS)))
                tracker.advance(1, f"layer {block.layer}, keep {ratio[position]}")
            store.unload(block.path)
    # The width of all layers is that of the widest: the largest pool decides.
    choices = [([layer.plan for layer in layers], max(layer.width for layer in layers)) for layers in found]
    sizes = result_bytes(source, choices, mtp=recipe.apply.mtp, export=recipe.apply.export)
    return [_ratio(*each) for each in zip(keeps, found, sizes, strict=True)]


@dataclass(frozen=True, slots=True)
class _Layer:
    plan: LayerPlan
    """Without its moves, which are as many as there are neurons."""
    width: int
    error: float | None


@torch.no_grad()
def _measured(block: Block, plan: LayerPlan, recipe: Recipe, stats: LayerStats) -> _Layer:
    how, bank = recipe.apply, block.bank()
    width = target_width([plan], how.merge, how.width)
    compressed = compress_layer(bank, plan, how.merge, how.router, width, recipe.seed, stats, how.refit)
    error = layer_error(bank, compressed, plan.kept, _first(stats), block.route())
    return _Layer(replace(plan, assignment=Assignment.empty()), width, error)


def _first(stats: LayerStats) -> LayerStats:
    """With the beginning of the sample, which is a uniform sample itself."""
    sample = {name: stats.values[name][:TOKENS] for name in ("sample", "router_sample") if name in stats.values}
    return replace(stats, values={**stats.values, **sample})


def _ratio(keep: int | float, layers: Sequence[_Layer], size: int) -> Ratio:
    counts = tuple(len(layer.plan.kept) for layer in layers)
    share = sum(counts) / sum(layer.plan.experts for layer in layers)
    return Ratio(keep, counts, share, size, tuple(layer.error for layer in layers))
