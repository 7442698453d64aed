"""The fast code against the slow formulas."""

from typing import Any

import pytest
import torch

from dernkit.builtin.groupings import DominantExpert, PseudoPruning
from dernkit.builtin.similarities import Cosine
from dernkit.testing.banks import random_bank
from dernkit.types import LayerStats, Retention
from tests.reference import groupings

KINDS = [
    pytest.param({"gated": gated, "bias": bias}, id=f"{'gated' if gated else 'plain'}-{'bias' if bias else 'nobias'}")
    for gated in (True, False)
    for bias in (True, False)
]
COUNTS = [(2, 1), (3, 1), (4, 2), (7, 1)]
NONE = LayerStats(0)


def heads(retention: Retention) -> dict[int, int]:
    """Each dropped expert -> the kept one of its group."""
    assert retention.group is not None
    return {d: int(retention.kept[retention.group[d]]) for d in retention.dropped}


def drawn(kind: dict[str, bool], groups: int, seed: int) -> tuple[Any, torch.Tensor]:
    scores = torch.rand(8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return random_bank(8, 5, 4, groups=groups, seed=seed, **kind), scores


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "groups"), COUNTS)
@pytest.mark.parametrize("seed", range(3))
def test_dominant_experts(kind: dict[str, bool], count: int, groups: int, seed: int) -> None:
    bank, scores = drawn(kind, groups, seed)
    fast = DominantExpert().select(bank, scores, count, NONE)
    kept = groupings.top(scores.tolist(), count, groups)
    assert fast.kept.tolist() == kept
    assert heads(fast) == groupings.dominant(groupings.cosine_similarity(bank, kept, ("up", "down")), kept)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("count", "groups"), COUNTS)
@pytest.mark.parametrize("size", [4, 5, 16])
@pytest.mark.parametrize("second", [False, True])
def test_pseudo_pruning(kind: dict[str, bool], count: int, groups: int, size: int, second: bool) -> None:
    bank, scores = drawn(kind, groups, seed=size)
    selector = PseudoPruning(group_size=size, second_similarity=Cosine(parts=("down",)) if second else None)
    fast = selector.select(bank, scores, count, NONE)
    kept = groupings.top(scores.tolist(), count, groups)
    tables = [groupings.cosine_similarity(bank, kept, ("up", "down"))]
    tables += [groupings.cosine_similarity(bank, kept, ("down",))] if second else []
    slow = groupings.pseudo_pruned(groupings.mean(tables), kept, scores.tolist(), size)
    assert fast.kept.tolist() == kept
    assert heads(fast) == slow
