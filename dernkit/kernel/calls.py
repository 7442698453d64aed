"""The one place where each kind of component is called, and what it returns is held to its contract.

Every function raises ContractError when a law of `contracts` is broken, with kind, name, layer and law.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float32, Float64, Int64
from torch import Tensor

from dernkit.api import (
    Assigner,
    BiasMerge,
    Budget,
    Evaluator,
    KeepLimits,
    Match,
    Merge,
    Observations,
    Observing,
    Refit,
    Report,
    Router,
    Scorer,
    Selector,
    Similarity,
    Source,
    Subject,
    Writer,
    Writing,
)
from dernkit.errors import RecipeError
from dernkit.kernel.contracts import FLOATING, Call, described
from dernkit.types import Assignment, ExpertBank, LayerDims, LayerPlan, LayerStats, Pool, Retention

_Decision = TypeVar("_Decision", Retention, Assignment)


def score(scorer: Scorer, bank: ExpertBank, stats: LayerStats) -> Float64[Tensor, " experts"]:
    """Finite scores of all experts, on the CPU."""
    call = Call("scorer", scorer, bank.dims.layer)
    scores = call("score", bank=bank, stats=_there(call, bank, stats))
    call.tensor(scores, "score", (bank.dims.experts,), torch.float64)
    return call.finite(scores, "score").cpu()


def measure(budget: Budget, bank: ExpertBank, scores: Float64[Tensor, " experts"], stats: LayerStats) -> Tensor:
    """A finite tensor on the CPU."""
    call = Call("budget", budget, bank.dims.layer)
    measured = call.instance(
        call("measure", bank=bank, scores=scores, stats=_there(call, bank, stats)), "measure", Tensor
    )
    return call.finite(measured, "measure").cpu()


def allocate(budget: Budget, measures: Sequence[Tensor], keep: int | float, limits: Sequence[KeepLimits]) -> list[int]:
    """One count for each layer, within its limits."""
    call = Call("budget", budget)
    counts = call.instance(call("allocate", measures=measures, keep=keep, limits=limits), "allocate", list)
    if len(counts) != len(limits):
        raise call.broken("in_range", f"allocate must return one count per layer ({len(limits)})", f"{len(counts)}")
    for count, limit in zip(counts, limits, strict=True):
        here = Call("budget", budget, limit.layer)
        here.instance(count, "a count", int)
        if not limit.smallest <= count <= limit.experts or count % limit.multiple:
            must = f"a count must be from {limit.smallest} to {limit.experts} in steps of {limit.multiple}"
            raise here.broken("in_range", must, f"{count}")
    return counts


def select(
    selector: Selector, bank: ExpertBank, scores: Float64[Tensor, " experts"], count: int, stats: LayerStats
) -> Retention:
    """As many experts as asked for, ascending, the same number from each of the router's groups; on the CPU."""
    call = Call("selector", selector, bank.dims.layer)
    found = call("select", bank=bank, scores=scores, count=count, stats=_there(call, bank, stats))
    found = _on_cpu(call.instance(found, "select", Retention))
    _check_kept(call, found.kept, bank.dims, count)
    call.tensor(found.scores, "scores", tuple(scores.shape), torch.float64)
    if not torch.equal(found.scores, scores.cpu()):
        raise call.broken("keeps_scores", "scores must be those that it was given", "others")
    if (found.group is not None) != selector.groups:
        must, got = ("groups", "none") if selector.groups else ("no groups", "some")
        raise call.broken("groups_as_said", f"select must return {must}, as its `groups` says", got)
    if found.group is not None:
        call.tensor(found.group, "group", (bank.dims.experts,), torch.int64)
        call.each(found.group, (found.group >= -1) & (found.group < count), "group", f"from -1 to {count - 1}")
        if not torch.equal(found.group[found.kept], torch.arange(count)):
            must = "group must be each kept expert's own position for itself"
            raise call.broken("own_group", must, str(found.group[found.kept].tolist()))
    return found


def _check_kept(call: Call, kept: Any, dims: LayerDims, count: int) -> None:
    call.tensor(kept, "kept", (count,), torch.int64)
    size = dims.experts // dims.groups
    exist = bool(((kept >= 0) & (kept < dims.experts)).all() and (kept[1:] > kept[:-1]).all())
    if not exist or bool((torch.bincount(kept // size, minlength=dims.groups) != count // dims.groups).any()):
        groups = f", {count // dims.groups} of each group of {size}" if dims.groups > 1 else ""
        must = f"kept must be {count} different experts from 0 to {dims.experts - 1}, ascending{groups}"
        raise call.broken("in_range", must, str(kept.tolist()))


def assign(assigner: Assigner, bank: ExpertBank, retention: Retention, stats: LayerStats) -> Assignment:
    """Moves from segments of dropped experts to kept ones. One segment may go to several experts. On the CPU."""
    call = Call("assigner", assigner, bank.dims.layer)
    found = call("assign", bank=bank, retention=retention, stats=_there(call, bank, stats))
    moves = _on_cpu(call.instance(found, "assign", Assignment))
    count = len(call.instance(moves.source, "source", Tensor).flatten())
    width, kept = bank.dims.width, retention.kept
    bounds = {"source": bank.dims.experts * width, "target": len(kept), "partner": width}
    for name, bound in bounds.items():
        index = call.tensor(getattr(moves, name), name, (count,), torch.int64)
        call.each(index, (index >= 0) & (index < bound), name, f"in [0, {bound})")
    dropped = ~torch.isin(moves.source // width, kept)
    call.each(moves.source, dropped, "source", "a segment of a dropped expert")
    call.tensor(moves.affinity, "affinity", (count,), *FLOATING)
    call.finite(moves.affinity, "affinity")
    if moves.scale is not None:
        _check_scale(call, moves.scale, (count,))
    if moves.left is not None:
        _check_left(call, moves, retention, width)
    return moves


def _check_left(call: Call, moves: Assignment, retention: Retention, width: int) -> None:
    """Own segments of kept experts, each once; a partner is one that stays."""
    left = call.tensor(moves.left, "left", None, torch.int64)
    ascending = torch.cat([torch.ones(1, dtype=torch.bool), left[1:] > left[:-1]])[: len(left)]
    legal = torch.isin(left // width, retention.kept) & (left >= 0) & ascending
    call.each(left, legal, "left", "segments of kept experts, different and ascending")
    stays = ~torch.isin(retention.kept[moves.target] * width + moves.partner, left)
    call.each(moves.partner, stays, "partner", "a neuron that its expert does not leave behind")


def _check_scale(call: Call, scale: Any, shape: tuple[int, ...]) -> Tensor:
    call.finite(call.tensor(scale, "scale", shape, *FLOATING), "scale")
    call.each(scale, scale != 0, "scale", "other than 0")
    return scale


def match(
    similarity: Similarity, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats
) -> Match:
    """Affinities and partners [W, K]. For assigners (and similarities) that hold a similarity."""
    call = Call("similarity", similarity, bank.dims.layer)
    found = call("match", bank=bank, dropped=dropped, kept=kept, stats=call.seen(stats))
    call.instance(found, "match", Match)
    shape = (bank.dims.width, len(kept))
    call.finite(call.tensor(found.affinity, "affinity", shape, *FLOATING), "affinity")
    partner = call.tensor(found.partner, "partner", shape, torch.int64)
    call.each(partner, (partner >= 0) & (partner < shape[0]), "partner", f"in [0, {shape[0]})")
    if found.scale is not None:
        _check_scale(call, found.scale, shape)
    return found


def pairs(
    similarity: Any, bank: ExpertBank, dropped: int, other: int, stats: LayerStats
) -> Float[Tensor, "width width"]:
    """Affinities of all neurons of two experts, by a similarity that is `Pairwise`."""
    call = Call("similarity", similarity, bank.dims.layer)
    found = call("pairs", bank=bank, dropped=dropped, other=other, stats=call.seen(stats))
    return call.finite(call.tensor(found, "pairs", (bank.dims.width,) * 2, *FLOATING), "pairs")


def merge(merge: Merge, pool: Pool, width: int, rng: torch.Generator, layer: int) -> Float32[Tensor, "merged p d"]:
    """Segments of the merged expert, at most ``width``.

    Raises:
        RecipeError: the merge keeps the width of experts, and the recipe asks for less.
    """
    call, what = Call("merge", merge, layer), f"segments of expert {pool.expert}"
    merged = call.tensor(call("merge", pool=pool, width=width, rng=rng), what, None, torch.float32)
    wide = merged.ndim > 0 and len(merged) > width
    if merged.ndim != 3 or merged.shape[1:] != pool.own.shape[1:] or (wide and len(merged) != len(pool.own)):
        must = f"{what} must have the shape [up to {', '.join(map(str, (width, *pool.own.shape[1:])))}]"
        raise call.broken("shape", must, str(list(merged.shape)))
    if wide:
        raise RecipeError(
            f"apply.width, layer {layer}, expert {pool.expert}: must be at least {len(merged)} for the merge "
            f"'{merge.name}', which keeps the width. Got {width} instead. Use a merge that clusters, such as "
            "'spherical-kmeans'."
        )
    return call.finite(merged, what)


def merge_bias(merge: BiasMerge, pool: Pool, layer: int) -> Float64[Tensor, " hidden"]:
    """The merged expert's down bias, by a merge that says what becomes of it."""
    call, what = Call("merge", merge, layer), f"the down bias of expert {pool.expert}"
    shape = None if pool.down_bias is None else (pool.down_bias.shape[1],)
    return call.finite(call.tensor(call("merge_bias", pool=pool), what, shape, torch.float64), what)


def update(
    router: Router, rows: Float32[Tensor, "experts row"], plan: LayerPlan, stats: LayerStats
) -> Float32[Tensor, "kept row"]:
    """Finite rows of the kept experts."""
    call = Call("router", router, plan.layer)
    found = call("update", rows=rows, plan=plan, stats=call.seen(stats))
    call.tensor(found, "rows", (len(plan.kept), rows.shape[1]), torch.float32)
    return call.finite(found, "rows")


def refit(
    refit: Refit, bank: ExpertBank, after: ExpertBank, plan: LayerPlan, stats: LayerStats
) -> Float32[Tensor, "kept hidden width"]:
    """Finite down projections of the experts after surgery."""
    call = Call("refit", refit, plan.layer)
    found = call("refit", bank=bank, after=after, plan=plan, stats=call.seen(stats))
    call.tensor(found, "down projections", tuple(after.down.shape), torch.float32)
    return call.finite(found, "down projections", "Penalise what the tokens do not determine.")


def tokens(
    source: Source,
    tokenizer: Any,
    sequences: int,
    length: int,
    rng: torch.Generator,
    writer: Callable[[], Writer] | None = None,
) -> Int64[Tensor, "sequences length"]:
    """Full sequences of token ids; a source that has the model write gets it from ``writer``."""
    call = Call("source", source)
    asked = {"tokenizer": tokenizer, "sequences": sequences, "length": length, "rng": rng}
    if writer is not None and isinstance(source, Writing):
        found = call("write", model=writer(), **asked)
    else:
        found = call("tokens", **asked)
    return call.tensor(found, "tokens", (sequences, length), torch.int64)


def evaluate(evaluator: Evaluator, subject: Subject) -> dict[str, float]:
    """Metric -> value."""
    call = Call("evaluator", evaluator)
    found = dict(call.instance(call("evaluate", subject=subject), "evaluate", Mapping))
    for name, value in found.items():
        call.instance(name, "a metric's name", str)
        if not isinstance(value, int | float):
            raise call.broken("type", f"metric '{name}' must be a number", described(value))
    return found


def observe(evaluator: Observing, subject: Subject) -> dict[str, Observations]:
    """Metric -> what was measured on each document."""
    call = Call("evaluator", evaluator)
    found = dict(call.instance(call("observe", subject=subject), "observe", Mapping))
    for name, seen in found.items():
        call.instance(name, "a metric's name", str)
        call.instance(seen, f"metric '{name}'", Observations)
        sizes = {len(seen.documents), len(seen.groups), len(seen.values), len(seen.weights)}
        if len(sizes) > 1 or not seen.documents or len(set(seen.documents)) < len(seen.documents):
            must = f"metric '{name}' must have a different name, a group, a value and a weight for each document"
            raise call.broken("shape", must, f"{sorted(sizes)} of them, {len(set(seen.documents))} names")
        if not np.isfinite(seen.values).all() or not (seen.weights > 0).all():
            raise call.broken("finite", f"metric '{name}' must have finite values and weights above 0", "others")
    return found


def render(report: Report, run: Mapping[str, Any]) -> str:
    """The text of a report."""
    call = Call("report", report)
    return call.instance(call("render", run=run), "render", str)


def _there(call: Call, bank: ExpertBank, stats: LayerStats) -> LayerStats:
    """What the component may see, where the weights lie."""
    return call.seen(stats).to(bank.up.device)


def _on_cpu(found: _Decision) -> _Decision:
    """A component works where the weights lie; what it decides is kept on the CPU."""
    given = {field.name: getattr(found, field.name) for field in fields(found)}
    there = {name: value for name, value in given.items() if isinstance(value, Tensor) and value.device.type != "cpu"}
    return replace(found, **{name: value.cpu() for name, value in there.items()}) if there else found
