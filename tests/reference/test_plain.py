"""The simplest components against loops, and a look that no strategy is without a reference."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from dernkit.api import KeepLimits
from dernkit.builtin.assigners import NoMoves
from dernkit.builtin.budgets import Uniform
from dernkit.builtin.matched import Hungarian
from dernkit.builtin.merges import Concatenate, Keep
from dernkit.builtin.selectors import TopScore
from dernkit.builtin.similarities import Cosine
from dernkit.builtin.whole_expert import WholeExpert
from dernkit.registry import Registry
from dernkit.testing.banks import random_bank, random_pool, retained
from dernkit.types import LayerStats
from tests.reference import groupings, similarities

HERE = Path(__file__).parent
STRATEGIES = ("scorer", "budget", "selector", "assigner", "similarity", "merge", "router", "refit")
NONE = LayerStats(0)
Moves = list[tuple[int, int, int]]
"""source, target, partner"""


def whole_expert(group: list[int], kept: list[int], width: int, partner: dict[int, list[int]]) -> Moves:
    """Every neuron of every dropped expert that is in a group, one after the other."""
    moves = []
    for expert, target in enumerate(group):
        if expert not in kept and target >= 0:
            moves += [(expert * width + neuron, target, partner[expert][neuron]) for neuron in range(width)]
    return moves


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("group", [[0, 0, 1, 1, 0], [0, 0, -1, 1, 1]])
def test_whole_experts(aligned: bool, group: list[int]) -> None:
    bank, kept = random_bank(5, 4, 3), [1, 3]
    found = WholeExpert(alignment=Hungarian(base=Cosine()) if aligned else None).assign(
        bank, retained(bank, kept, group), NONE
    )
    partner = {}
    for expert in (0, 2, 4):
        pairs = similarities.cosine_pairs(bank, expert, kept[group[expert]], ("up", "down"), sign=False, balance=False)
        partner[expert] = [j for _, j in similarities.hungarian(pairs)] if aligned else [0, 1, 2, 3]
    slow = whole_expert(group, kept, 4, partner)
    assert list(zip(found.source.tolist(), found.target.tolist(), found.partner.tolist(), strict=True)) == slow


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_top_scores(groups: int, seed: int) -> None:
    bank = random_bank(8, 4, 3, groups=groups)
    scores = torch.randint(4, (8,), generator=torch.Generator().manual_seed(seed)).to(torch.float64)
    found = TopScore().select(bank, scores, 4, NONE)
    assert found.kept.tolist() == groupings.top(scores.tolist(), 4, groups)


@pytest.mark.parametrize("arrivals", [0, 1, 7])
def test_merges_that_compute_nothing(arrivals: int) -> None:
    pool = random_pool(arrivals=arrivals)
    own, incoming = pool.own.tolist(), pool.incoming.tolist()
    assert Keep().merge(pool, 8, torch.Generator()).tolist() == own
    assert Concatenate().merge(pool, 15, torch.Generator()).tolist() == own + incoming


def test_no_moves() -> None:
    bank = random_bank(5, 4, 3)
    assert NoMoves().assign(bank, retained(bank, [1, 3]), NONE).source.tolist() == []


@pytest.mark.parametrize(("keep", "counts"), [(0.5, [4, 8, 5]), (3, [3, 3, 3]), (1.0, [8, 16, 10])])
def test_uniform_counts(keep: int | float, counts: list[int]) -> None:
    limits = [KeepLimits(layer, experts, 2, 1) for layer, experts in enumerate((8, 16, 10))]
    assert Uniform().allocate([], keep, limits) == counts


def test_every_strategy_is_held_against_a_reference() -> None:
    tests = "\n".join(file.read_text(encoding="utf-8") for file in HERE.glob("test_*.py"))
    registry = Registry.load(entry_points=False)
    missing = [
        component.name
        for kind in STRATEGIES
        for component in registry.components(kind)
        if not re.search(rf"\b{component.cls.__name__}\(", tests)
    ]
    assert not missing
