"""Laws of budgets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from dernkit.kernel.selection import kept_count
from dernkit.testing.banks import permute_experts, permute_stats
from dernkit.testing.cases import CASES, Case, expert_order, layers, limits_of
from dernkit.testing.law import Check, require
from dernkit.testing.trials import allocated

Parts = tuple[Sequence[Any], ...]
"""Banks, scores and statistics of all layers."""


@dataclass(frozen=True, slots=True)
class Given:
    """Three layers, and how much of them is to stay."""

    what: str
    stack: Sequence[Case]
    keep: int | float


def measures(budget: Any, given: Given) -> None:
    """What is measured of a layer is a tensor."""
    for case in given.stack:
        found = budget.measure(case.bank, case.scores, case.stats)
        require(isinstance(found, Tensor), "measure a tensor", type(found).__name__, "Return torch.empty(0) for none.")


def in_range(budget: Any, given: Given) -> None:
    """Every layer gets a count, an int, that its router allows."""
    counts, limits = _counts(budget, given.stack, given.keep), limits_of(given.stack)
    require(len(counts) == len(limits), f"allocate a count for each of {len(limits)} layers", counts, "One each.")
    for count, limit in zip(counts, limits, strict=True):
        require(
            isinstance(count, int) and limit.smallest <= count <= limit.experts and count % limit.multiple == 0,
            f"give layer {limit.layer} from {limit.smallest} to {limit.experts} experts in steps of {limit.multiple}",
            repr(count),
            "Heed `limits`.",
        )


def within_budget(budget: Any, given: Given) -> None:
    """All layers together keep no more than was asked for."""
    counts = _counts(budget, given.stack, given.keep)
    most = sum(kept_count(given.keep, limit) for limit in limits_of(given.stack))
    require(sum(counts) <= most, f"keep at most {most} experts in all", f"{sum(counts)} ({counts})", "Round down.")


def keep_all(budget: Any, given: Given) -> None:
    """With keep 1.0 every expert stays."""
    counts, every = _counts(budget, given.stack, 1.0), [case.bank.dims.experts for case in given.stack]
    require(counts == every, f"keep {every} experts when all of them are to stay", counts, "1.0 is all of them.")


def layer_order(budget: Any, given: Given) -> None:
    """Layers in another order get the same counts in that order."""
    counts = _counts(budget, given.stack, given.keep)
    turned = _counts(budget, given.stack[::-1], given.keep)[::-1]
    require(turned == counts, "give layers the same counts in any order", f"{turned} for {counts}", "Use no number.")


def expert_permutation(budget: Any, given: Given) -> None:
    """Experts in another order change no count."""
    turned: Parts = tuple(zip(*(_turned(case) for case in given.stack), strict=True))
    counts, other = (_allocated(budget, each, given.keep, given.stack) for each in (_parts(given.stack), turned))
    require(other == counts, "give the same counts in any order of the experts", f"{other} for {counts}", "Sort.")


def _turned(case: Case) -> tuple[Any, ...]:
    order = expert_order(case.bank)
    return permute_experts(case.bank, order), case.scores[order], permute_stats(case.stats, order)


def _parts(stack: Sequence[Case]) -> Parts:
    return tuple([getattr(case, name) for case in stack] for name in ("bank", "scores", "stats"))


def _allocated(budget: Any, parts: Parts, keep: int | float, stack: Sequence[Case]) -> list[int]:
    banks, scores, stats = parts
    return list(allocated(budget, banks, scores, stats, keep, limits_of(stack))[1])


def _counts(budget: Any, stack: Sequence[Case], keep: int | float) -> list[int]:
    return _allocated(budget, _parts(stack), keep, stack)


def _stacks(builds: Sequence[Callable[..., Case]]) -> list[Given]:
    found = [layers(build) for build in builds]
    return [
        Given(f"{stack[0].what}, keep {keep}", stack, keep)
        for stack in found
        for keep in (0.5, 0.75, len(stack[0].kept))
    ]


def laws() -> list[Check]:
    """Of budgets."""
    everywhere, first = partial(_stacks, CASES), partial(_stacks, CASES[:5])
    checks = [Check("budget", law, everywhere) for law in (measures, in_range, within_budget, keep_all)]
    return checks + [Check("budget", law, first) for law in (layer_order, expert_permutation)]
