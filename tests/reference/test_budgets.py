"""Fast budgets against every allocation, and the error curve against loops."""

import random

import pytest
import torch

from dernkit.api import KeepLimits
from dernkit.builtin.budgets import Global, ReconstructionAware
from dernkit.testing.banks import random_bank, random_stats
from dernkit.types import LayerStats
from tests.reference import budgets as slow

LAYERS = {
    "alike": [KeepLimits(0, 8, 2, 1), KeepLimits(1, 8, 2, 1), KeepLimits(2, 8, 2, 1)],
    "groups": [KeepLimits(0, 8, 4, 2), KeepLimits(1, 8, 4, 2), KeepLimits(3, 8, 4, 2)],
    "sizes": [KeepLimits(0, 6, 2, 1), KeepLimits(1, 9, 3, 3), KeepLimits(2, 4, 2, 2)],
}
KEEP = [0.5, 0.66, 1.0, 4, 6]


@pytest.mark.parametrize("layers", ["alike", "groups"])
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("minimum", [0.0, 0.3])
@pytest.mark.parametrize("how", ["none", "sum", "max", "rank"])
def test_global_keeps_the_most_score(layers: str, keep: int | float, minimum: float, how: str) -> None:
    limits = LAYERS[layers]
    dice = random.Random(f"{layers}{keep}{minimum}{how}")
    scores = [[dice.random() ** 3 for _ in range(limit.experts)] for limit in limits]
    budget = Global(normalise=how, minimum=minimum)
    measures = [
        budget.measure(random_bank(limit.experts, groups=limit.multiple), torch.tensor(layer).double(), LayerStats(0))
        for layer, limit in zip(scores, limits, strict=True)
    ]
    counts = budget.allocate(measures, keep, limits)
    assert tuple(counts) in slow.allocations(keep, limits, minimum)
    layers_ = [slow.comparable(layer, how) for layer in scores]
    best = slow.most_worth(scores, keep, limits, minimum, how)
    assert slow.kept_worth(layers_, counts, limits) == pytest.approx(best, rel=1e-6)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("keep", KEEP)
@pytest.mark.parametrize("minimum", [0.0, 0.3])
def test_reconstruction_aware_finds_the_smallest_sum(layers: str, keep: int | float, minimum: float) -> None:
    limits = LAYERS[layers]
    dice = random.Random(f"{layers}{keep}{minimum}")
    curves = [[dice.random() for _ in range(limit.experts // limit.multiple)] for limit in limits]  # not even falling
    keep = min(keep, 6) if layers == "sizes" else keep
    measures = [torch.tensor(curve, dtype=torch.float64) for curve in curves]
    counts = ReconstructionAware(minimum=minimum).allocate(measures, keep, limits)
    assert tuple(counts) in slow.allocations(keep, limits, minimum)
    best = slow.least_error(curves, keep, limits, minimum)
    assert slow.summed(curves, counts, limits) == pytest.approx(best, rel=1e-12)


@pytest.mark.parametrize("points", [9, 3])
def test_error_curve(points: int) -> None:
    bank = random_bank(7, 4, 3)
    stats = random_stats(bank, sample=9)
    scores = torch.rand(7, generator=torch.Generator().manual_seed(1)).double()
    curve = ReconstructionAware(points=points, tokens=6).measure(bank, scores, stats)
    order = sorted(range(7), key=lambda e: -float(scores[e]))
    sample = stats["sample"][:6].double().tolist()
    errors = {count: slow.relative_error(bank, sample, sorted(order[:count])) for count in range(2, 8)}
    if points == 3:
        errors |= {3: errors[2] + (errors[4] - errors[2]) / 2}
        errors |= {count: errors[4] * (7 - count) / 3 for count in (5, 6)}
    expected = [errors[2], *(errors[count] for count in range(2, 8))]
    assert len(set(expected[1:])) > 4 and expected[-1] == 0
    torch.testing.assert_close(curve, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)
