"""Laws of selectors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dernkit.testing.banks import permute_experts, permute_stats
from dernkit.testing.cases import Case, cases, expert_order, inverse, unequal
from dernkit.testing.law import Check, require
from dernkit.types import Retention


def kept_count(selector: Any, case: Case) -> None:
    """As many experts stay as were asked for, whatever number the router allows."""
    dims = case.bank.dims
    for count in range(dims.smallest_keep, dims.experts, dims.groups):
        kept = selector.select(case.bank, case.scores, count, case.stats).kept
        require(kept.shape == (count,), f"keep {count} experts when asked for {count}", len(kept), "Return so many.")


def kept_order(selector: Any, case: Case) -> None:
    """Kept experts are different source indices, int64, ascending."""
    kept = _select(selector, case).kept
    fits = kept.dtype == torch.int64 and bool((kept >= 0).all() and (kept < case.bank.dims.experts).all())
    require(
        fits and bool((kept[1:] > kept[:-1]).all()),
        f"keep different experts from 0 to {case.bank.dims.experts - 1}, int64, ascending",
        f"{kept.tolist()} ({kept.dtype})",
        "Sort them.",
    )


def router_groups(selector: Any, case: Case) -> None:
    """As many experts stay in each of the router's groups."""
    dims = case.bank.dims
    size = dims.experts // dims.groups
    counts = torch.bincount(_select(selector, case).kept // size, minlength=dims.groups).tolist()
    require(len(set(counts)) == 1, "keep as many experts of each router group", counts, "Select group by group.")


def keeps_scores(selector: Any, case: Case) -> None:
    """The scores that a selector was given are handed on."""
    scores = _select(selector, case).scores
    require(torch.equal(scores, case.scores), "hand on the scores that it was given", "others", "Return `scores`.")


def own_group(selector: Any, case: Case) -> None:
    """Groups are positions among the kept experts or −1, and each kept expert is in its own."""
    found = _select(selector, case)
    group, count = found.group, len(found.kept)
    if group is None:
        return
    shaped = group.dtype == torch.int64 and group.shape == case.scores.shape
    require(
        shaped and bool((group >= -1).all() and (group < count).all()),
        f"group by int64 positions from -1 to {count - 1}, one for each of the {len(case.scores)} experts",
        f"{group.tolist()} ({group.dtype})",
        "Return positions among the kept experts, not their numbers.",
    )
    own = group[found.kept].tolist()
    require(own == list(range(count)), "group each kept expert with itself", own, "Give kept experts their own place.")


def expert_permutation(selector: Any, case: Case) -> None:
    """Of experts in another order the same ones stay, with the same ones in their group."""
    order = expert_order(case.bank)
    stats, count = permute_stats(case.stats, order), len(case.kept)
    other = selector.select(permute_experts(case.bank, order), case.scores[order], count, stats)
    before, after = _leaders(_select(selector, case)), _leaders(other)
    found = [int(order[after[place]]) if after[place] >= 0 else -1 for place in inverse(order).tolist()]
    require(found == before, "decide alike in any order of the experts", f"{found} for {before}", "Use no numbers.")


def _select(selector: Any, case: Case) -> Retention:
    return selector.select(case.bank, case.scores, len(case.kept), case.stats)


def _leaders(found: Retention) -> list[int]:
    """For each expert the kept one of its group, itself where it is kept; −1: none."""
    kept = found.kept.tolist()
    group: Tensor = torch.full((len(found.scores),), -1) if found.group is None else found.group
    grouped = [kept[place] if place >= 0 else -1 for place in group.tolist()]
    return [expert if expert in kept else grouped[expert] for expert in range(len(grouped))]


def laws() -> list[Check]:
    """Of selectors."""
    everywhere = (kept_count, kept_order, router_groups, keeps_scores, own_group)
    return [*(Check("selector", law, cases) for law in everywhere), Check("selector", expert_permutation, unequal)]
