"""Laws of merges."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dernkit.kernel.outputs import segment_activations
from dernkit.testing.cases import Case, cases, neuron_order, pool_of, unequal
from dernkit.testing.law import Check, require
from dernkit.testing.trials import generator, pool_width, pools
from dernkit.types import Pool

TOLERANCE = 1e-3
"""Of an expert's output, relative to the largest: merged neurons are float32 averages in another order."""


@dataclass(frozen=True, slots=True)
class Given:
    """What one kept expert gets."""

    what: str
    pool: Pool
    hidden: int


def shape(merge: Any, given: Given) -> None:
    """At most the asked width of segments, with the parts and features that they had."""
    merged, width = _merged(merge, given.pool), pool_width(given.pool, merge.widens)
    parts, features = given.pool.own.shape[1:]
    shaped = isinstance(merged, Tensor) and merged.ndim == 3 and merged.shape[1:] == (parts, features)
    require(
        shaped and len(merged) <= width,
        f"return at most {width} segments, shape [up to {width}, {parts}, {features}]",
        lambda: list(merged.shape) if isinstance(merged, Tensor) else type(merged).__name__,
        "Keep the parts and features of segments, and no more of them than `width`.",
    )


def dtype(merge: Any, given: Given) -> None:
    """Segments stay float32, as the pool has them; the kernel casts them to the checkpoint's dtype."""
    merged = _merged(merge, given.pool)
    require(merged.dtype == torch.float32, "return float32 segments", merged.dtype, "Cast sums back to float32.")


def zero_weights(merge: Any, given: Given) -> None:
    """Where all experts of a pool weigh nothing, segments are finite."""
    weights = torch.zeros_like(given.pool.incoming_weight)
    merged = _merged(merge, replace(given.pool, own_weight=0.0, incoming_weight=weights))
    finite = bool(merged.isfinite().all())
    require(finite, "return finite segments where all weights are 0", "NaN or infinity", "Divide by no sum of 0.")


def exact_copies(merge: Any, given: Given) -> None:
    """An expert merged with a copy of itself, its neurons in any order, computes what it did."""
    own, order = given.pool.own, neuron_order(len(given.pool.own), 23)
    pool = replace(
        given.pool,
        incoming=own[order],
        incoming_weight=torch.full((len(own),), 0.7),
        incoming_expert=given.pool.incoming_expert[:1].expand(len(own)),
        partner=order,
        affinity=torch.ones(len(own)),
    )
    merged = _merged(merge, pool)
    _same_function(merged, own, given, "leave the function of an expert that is merged with its copy", "Average twins.")


def arrival_order(merge: Any, given: Given) -> None:
    """Arrivals in another order make an expert of the same function."""
    pool, order = given.pool, neuron_order(len(given.pool.incoming), 29)
    other = replace(
        pool,
        incoming=pool.incoming[order],
        incoming_weight=pool.incoming_weight[order],
        incoming_expert=pool.incoming_expert[order],
        partner=pool.partner[order],
        affinity=pool.affinity[order],
    )
    must = "make the same function of the arrivals in any order"
    _same_function(_merged(merge, other), _merged(merge, pool), given, must, "Let no arrival count by its place.")


def neuron_permutation(merge: Any, given: Given) -> None:
    """Own neurons in another order make an expert of the same function."""
    pool, order = given.pool, neuron_order(len(given.pool.own), 31)
    other = replace(pool, own=pool.own[order], partner=torch.argsort(order)[pool.partner])
    must = "make the same function of the own neurons in any order"
    _same_function(_merged(merge, other), _merged(merge, pool), given, must, "Let no neuron count by its place.")


def _merged(merge: Any, pool: Pool) -> Tensor:
    return merge.merge(pool, pool_width(pool, merge.widens), generator())


def _same_function(one: Tensor, other: Tensor, given: Given, must: str, fix: str) -> None:
    inputs = torch.randn(16, given.hidden, generator=generator(37))
    first, second = (_output(segments, given, inputs) for segments in (one, other))
    distance, scale = float((first - second).abs().max()), float(second.abs().max())
    require(distance <= TOLERANCE * scale, must, f"outputs that differ by {distance:.3g} of {scale:.3g}", fix)


def _output(segments: Tensor, given: Given, inputs: Tensor) -> Tensor:
    """[n, H]: what an expert of these neurons computes, without a down bias."""
    activations = segment_activations(segments.to(torch.float32), given.pool.act, inputs)
    return activations @ segments[:, -1, : given.hidden].to(torch.float32)


def _given(found: Callable[[], Sequence[Case]]) -> list[Given]:
    names = ("an expert arrives", "parts of experts arrive", "one neuron arrives")
    return [
        Given(f"{case.what}, {name}", pool, case.bank.dims.hidden)
        for case in found()
        for name, pool in zip(names, pools(case), strict=True)
    ]


def _all() -> list[Given]:
    return _given(cases)


def _unequal() -> list[Given]:
    return _given(unequal)


def _whole() -> list[Given]:
    found = [(case, pool_of(case, case.dropped[:1])) for case in unequal()]
    return [Given(case.what, pool, case.bank.dims.hidden) for case, pool in found]


def _keeps_width(merge: Any) -> bool:
    return not merge.widens


def laws() -> list[Check]:
    """Of merges."""
    return [
        *(Check("merge", law, _all) for law in (shape, dtype, zero_weights)),
        Check("merge", exact_copies, _whole, only_if=_keeps_width),
        *(Check("merge", law, _unequal) for law in (arrival_order, neuron_permutation)),
    ]
