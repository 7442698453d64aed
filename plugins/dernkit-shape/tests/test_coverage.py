"""Every layer keeps what holds the same share of its scores, and the total is what was asked for."""

import pytest
import reference
import torch
from dernkit_shape import Coverage

from dernkit.api import KeepLimits
from dernkit.testing.banks import random_bank, random_stats
from dernkit.types import LayerStats

BANK = random_bank(8, 2, 2)


def allocated(scores: list[list[float]], keep: float | int, smallest: int = 1) -> list[int]:
    measures = [Coverage().measure(BANK, torch.tensor(layer).double(), LayerStats(0)) for layer in scores]
    return Coverage().allocate(measures, keep, [KeepLimits(i, 8, smallest, 1) for i in range(len(scores))])


def drawn(seed: int) -> list[list[float]]:
    rng = torch.Generator().manual_seed(seed)
    return [(torch.rand(8, generator=rng).double() ** power - 0.02).tolist() for power in (1, 3, 9)]


def test_a_layer_whose_worth_lies_in_few_experts_keeps_few() -> None:
    flat, steep = [1.0] * 8, [90.0, 8.0, 1.0, 0.5, 0.25, 0.15, 0.06, 0.04]
    # What the first 0, 1, 2, … hold: flat 0, 1/8, 2/8, …; steep 0, .9, .98, .99, …
    assert allocated([flat, steep], 0.5) == [7, 1]
    assert allocated([flat, steep], 0.5, smallest=3) == [5, 3]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("keep", [0.25, 0.5, 0.8, 1.0, 3])
@pytest.mark.parametrize("smallest", [1, 2])
def test_there_is_one_share_that_gives_the_counts(seed: int, keep: float, smallest: int) -> None:
    scores = drawn(seed)
    counts = allocated(scores, keep, smallest)
    assert sum(counts) == 3 * (keep if isinstance(keep, int) else round(keep * 8 + 1e-9))
    shares = [i / 2000 for i in range(2001)]
    possible = [[reference.covering(layer, alpha, smallest) for layer in scores] for alpha in shares]
    near = min(possible, key=lambda other: abs(sum(other) - sum(counts)))
    assert (
        sum(abs(a - b) for a, b in zip(near, counts, strict=True)) <= abs(sum(near) - sum(counts)) + (keep == 1.0) * 9
    )


def test_the_routers_groups_stay_equally_large() -> None:
    bank = random_bank(8, 2, 2, groups=2)
    scores = torch.tensor([8, 1, 0.5, 0.5, 1, 1, 2, 16], dtype=torch.float64)
    held = Coverage().measure(bank, scores, random_stats(bank))
    assert (held * 30).tolist() == pytest.approx([0, 24, 27, 28.5, 30])
    limits = [KeepLimits(0, 8, 4, 2), KeepLimits(1, 8, 3, 2)]
    flat = Coverage().measure(bank, torch.zeros(8, dtype=torch.float64), random_stats(bank))
    assert flat.tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert Coverage().allocate([held, flat], 0.75, limits) == [4, 8]


def test_scores_that_are_all_0_are_divided_evenly() -> None:
    assert allocated([[0.0] * 8] * 3, 0.5) == [4, 4, 4]
    assert allocated([[0.0] * 8, [-1.0] * 8], 5) == [5, 5]
