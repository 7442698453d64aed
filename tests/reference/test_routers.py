"""The fast router updates against the slow formulas."""

from dataclasses import replace

import pytest
import torch

from dernkit.builtin.assigners import Affinity
from dernkit.builtin.routers import Additive, Average, LogMass
from dernkit.testing.banks import random_bank, random_stats, retained
from dernkit.types import LayerPlan, LayerStats
from tests.reference import dern, routers
from tests.reference.test_dern import close

KEPT = [0, 4]
BANK = random_bank(5, 6, 4)


def plan(quantile: float = 0.6) -> LayerPlan:
    moves = Affinity(quantile=quantile).assign(BANK, retained(BANK, KEPT), LayerStats(0))
    scores = torch.tensor([0.3, -0.2, 0.9, 0.1, 0.5], dtype=torch.float64)
    return LayerPlan(0, 5, 6, scores, torch.tensor(KEPT), moves)


def pairs(plan: LayerPlan) -> list[tuple[int, int]]:
    return list(zip(plan.assignment.source.tolist(), plan.assignment.target.tolist(), strict=True))


@pytest.mark.parametrize("quantile", [0.3, 0.6, 1.0])
def test_additive(quantile: float) -> None:
    new = Additive().update(BANK.router, plan(quantile), LayerStats(0))
    close(new, dern.additive_router(BANK.router.double().tolist(), KEPT, pairs(plan(quantile)), 6))


@pytest.mark.parametrize("quantile", [0.3, 0.6, 1.0])
@pytest.mark.parametrize("weights", ["score", "uniform", "frequency"])
def test_average(quantile: float, weights: str) -> None:
    stats = random_stats(BANK)
    by_expert = {
        "score": [0.3, 0.0, 0.9, 0.1, 0.5],
        "uniform": [1.0] * 5,
        "frequency": stats["routed"].tolist(),
    }[weights]
    new = Average(weights=weights).update(BANK.router, plan(quantile), stats)
    close(new, routers.average(BANK.router.double().tolist(), KEPT, pairs(plan(quantile)), 6, by_expert))


@pytest.mark.parametrize("sample", [1, 3, 4, 5, 40])
@pytest.mark.parametrize("ridge", [1e-3, 0.1, 10.0])
def test_log_mass_where_rows_are_fitted(sample: int, ridge: float) -> None:
    stats = random_stats(BANK, sample=sample)
    new = LogMass(ridge=ridge).update(BANK.router, plan(), stats)
    inputs = stats["sample"].double().tolist()
    close(new, routers.log_mass_rows(BANK.router.double().tolist(), KEPT, pairs(plan()), 6, inputs, ridge))


@pytest.mark.parametrize("dead", [[], [4], [1, 2, 3], [0, 1, 2, 3, 4]])
def test_log_mass_where_there_is_a_bias(dead: list[int]) -> None:
    stats = random_stats(BANK)
    stats["gate_sum"][dead] = 0
    new = LogMass().update(BANK.router, replace(plan(), biased_rows=True), stats)
    biases, mass = BANK.router[:, -1].double().tolist(), stats["gate_sum"].tolist()
    close(new[:, -1], routers.log_mass_biases(biases, KEPT, pairs(plan()), 6, mass, stats.tokens))
    assert torch.equal(new[:, :-1], BANK.router[KEPT][:, :-1])
