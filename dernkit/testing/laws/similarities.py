"""Laws of similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dernkit.testing.banks import copy_expert, permute_neurons
from dernkit.testing.cases import Case, cases, different, inverse, neuron_order, unequal
from dernkit.testing.law import Check, require

TOLERANCE = 1e-4


def match_shape(similarity: Any, case: Case) -> None:
    """Affinities are floating [W, K], partners int64 [W, K], one column for each kept expert."""
    found, shape = _match(similarity, case), (case.bank.dims.width, len(case.kept))
    shaped = found.affinity.shape == shape and found.partner.shape == shape
    typed = found.affinity.is_floating_point() and found.partner.dtype == torch.int64
    require(
        shaped and typed,
        f"return floating affinities and int64 partners of shape {list(shape)}",
        f"{found.affinity.dtype} {list(found.affinity.shape)} and {found.partner.dtype} {list(found.partner.shape)}",
        "One row for each neuron of the dropped expert, one column for each kept expert.",
    )


def in_range(similarity: Any, case: Case) -> None:
    """Partners are neurons."""
    partner, width = _match(similarity, case).partner, case.bank.dims.width
    legal = bool(((partner >= 0) & (partner < width)).all())
    require(legal, f"return partners from 0 to {width - 1}", partner.flatten().tolist(), "Return neurons' numbers.")


def kept_order(similarity: Any, case: Case) -> None:
    """Kept experts in another order are matched alike, each one's column in its place."""
    order = torch.arange(len(case.kept)).flip(0)
    found, other = _match(similarity, case), similarity.match(*_asked(case, case.bank, case.kept[order]))
    _close(other.affinity, found.affinity[:, order], "match each kept expert alike wherever it stands")


def dropped_neurons(similarity: Any, case: Case) -> None:
    """Neurons of the dropped expert in another order: the same rows in that order."""
    expert = case.dropped[0]
    order = neuron_order(case.bank.dims.width)
    found = _match(similarity, case)
    other = similarity.match(*_asked(case, permute_neurons(case.bank, expert, order)))
    _close(other.affinity, found.affinity[order], "match each dropped neuron alike wherever it stands")
    same = torch.equal(other.partner, found.partner[order])
    require(same, "find the same partner for a dropped neuron wherever it stands", "others", "Use no neuron's number.")


def kept_neurons(similarity: Any, case: Case) -> None:
    """Neurons of kept experts in another order are found where they are then."""
    bank, order = case.bank, neuron_order(case.bank.dims.width)
    for expert in case.kept.tolist():
        bank = permute_neurons(bank, expert, order)
    found, other = _match(similarity, case), similarity.match(*_asked(case, bank))
    _close(other.affinity, found.affinity, "give the same affinities in any order of the kept experts' neurons")
    same = torch.equal(other.partner, inverse(order)[found.partner])
    require(same, "follow a kept neuron to where it is", "another partner", "Return the partner's own number.")


def self_match(similarity: Any, case: Case) -> None:
    """Every neuron of a copy of a kept expert matches that expert at least as well as any other."""
    found = similarity.match(*_copied(case)[0])
    own, best = found.affinity[:, 0], found.affinity.max(dim=1).values
    require(
        bool((own >= best - TOLERANCE * (1 + best.abs())).all()),
        "match a copy of a kept expert best with that expert",
        f"affinities {[round(v, 4) for v in own.tolist()]} where others have {[round(v, 4) for v in best.tolist()]}",
        "Let equal neurons have the highest affinity.",
    )


def self_partner(similarity: Any, case: Case) -> None:
    """The partner of every neuron of a copy of a kept expert is the neuron that it is a copy of."""
    asked, order = _copied(case)
    found = similarity.match(*asked).partner[:, 0]
    require(
        torch.equal(found, order),
        "pair each neuron of a copy with the neuron that it is a copy of",
        f"{found.tolist()} for {order.tolist()}",
        "Let equal neurons have the highest affinity.",
    )


def pairs(similarity: Any, case: Case) -> None:
    """Affinities are those that `pairs` gives a neuron and its partner."""
    found, dropped = _match(similarity, case), case.dropped[0]
    for column, expert in enumerate(case.kept.tolist()):
        table = similarity.pairs(case.bank, dropped, expert, case.stats)
        width = case.bank.dims.width
        shaped = isinstance(table, Tensor) and table.shape == (width, width)
        require(shaped, f"return pairs of shape {[width, width]}", lambda t=table: list(t.shape), "Fix `pairs`.")
        paired = table.gather(1, found.partner[:, column : column + 1])[:, 0]
        _close(found.affinity[:, column], paired, "match as `pairs` says")


def _asked(case: Case, bank: Any, kept: Tensor | None = None) -> tuple[Any, ...]:
    return bank, case.dropped[0], case.kept if kept is None else kept, case.stats


def _match(similarity: Any, case: Case) -> Any:
    return similarity.match(*_asked(case, case.bank))


def _copied(case: Case) -> tuple[tuple[Any, ...], Tensor]:
    """The first dropped expert as a copy of the first kept one, with its router row and statistics."""
    order, kept, dropped = neuron_order(case.bank.dims.width), int(case.kept[0]), case.dropped[0]
    bank = copy_expert(case.bank, kept, dropped, order)
    bank.router[dropped] = bank.router[kept]
    for name, value in case.stats.values.items():
        if "sample" not in name:
            value[dropped] = value[kept]
    return (bank, dropped, case.kept, case.stats), order


def _close(found: Tensor, expected: Tensor, must: str) -> None:
    distance = (found - expected).abs()
    worst = int(distance.argmax())
    got = f"affinity {found.flatten()[worst].item():.6g} for {expected.flatten()[worst].item():.6g}"
    near = bool((distance <= TOLERANCE * (1 + expected.abs())).all())
    require(near, must, got, "Compute it from the two neurons alone.")


def _has_pairs(similarity: Any) -> bool:
    return callable(getattr(type(similarity), "pairs", None))


def laws() -> list[Check]:
    """Of similarities."""
    checks = [Check("similarity", law, cases) for law in (match_shape, in_range)]
    checks += [Check("similarity", law, unequal) for law in (kept_order, dropped_neurons, kept_neurons)]
    checks += [Check("similarity", law, unequal) for law in (self_match, self_partner)]
    return [*checks, Check("similarity", pairs, different, only_if=_has_pairs)]
