"""The fast statistics of comparisons against the slow ones of `tests.reference.comparisons`."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from dernkit.compare.ranks import rank
from dernkit.compare.statistics import Interval, Side, estimate, holm, panel, recovered
from dernkit.observations import Observations
from tests.reference import comparisons as slow

RESAMPLES = 10_000
CLOSE = 0.03
"""A variance of that many resamples has a standard error of 0.7 %."""


def recipe(
    rng: random.Random, *, seeds: int, rise: float, sizes: tuple[int, ...] = (30, 40, 25), own_weights: bool = False
) -> list[list]:
    """Documents of three domains; what a recipe does depends on the document, the seed and both.

    ``own_weights``: weights are those of what the model wrote, not of the text.
    """
    text = random.Random(7)
    documents = [(f"domain {g}", text.uniform(20, 400)) for g, size in enumerate(sizes) for _ in range(size)]
    base = [text.gauss(1.5, 0.4) for _ in documents]
    harm = [rise * text.lognormvariate(0, 0.7) for _ in documents]
    found = []
    for _ in range(seeds):
        luck = rng.gauss(0, 0.03) if rise else 0.0
        rates = [b + h + (luck + rng.gauss(0, 0.05) if rise else 0.0) for b, h in zip(base, harm, strict=True)]
        weights = [w * rng.uniform(0.8, 1.2) if own_weights else w for _, w in documents]
        groups = [g for g, _ in documents]
        found.append([(g, rate * w, w) for g, rate, w in zip(groups, rates, weights, strict=True)])
    return found


def observations(measurement: list) -> Observations:
    groups, values, weights = zip(*measurement, strict=True)
    names = tuple(f"{i:03}" for i in range(len(groups)))
    return Observations(names, groups, np.array(values), np.array(weights))


@pytest.fixture(scope="module", params=[False, True], ids=["the text's weights", "own weights"])
def measured(request: pytest.FixtureRequest) -> tuple[list[list], list[list], list[list]]:
    rng, own = random.Random(1), request.param
    return tuple(recipe(rng, seeds=n, rise=rise, own_weights=own) for n, rise in ((3, 0.2), (3, 0.5), (1, 0.0)))


@pytest.fixture(scope="module")
def together(measured: tuple[list[list], ...]) -> object:
    one, other, original = measured
    return panel([observations(seen) for seen in [*one, *other, *original]], where="all", resamples=RESAMPLES)


ONE: Side = {0: 0, 1: 1, 2: 2}
OTHER: Side = {0: 3, 1: 4, 2: 5}
APART: Side = {3: 3, 4: 4, 5: 5}
ORIGINAL: Side = {None: 6}


@pytest.mark.parametrize("against", ["a paired recipe", "other seeds", "the original"])
def test_difference_interval_and_p(measured: tuple[list[list], ...], together: object, against: str) -> None:
    one, other, original = measured
    side, rows = {
        "a paired recipe": (OTHER, other),
        "other seeds": (APART, other),
        "the original": (ORIGINAL, original),
    }[against]
    terms = [(1.0, one), (-1.0, rows)]
    by_seed = slow.separate_seeds(terms) if against == "other seeds" else slow.paired_seeds(terms)
    variance, freedom = slow.satterthwaite([*slow.document_parts(terms), *by_seed])
    found = estimate(together, [(1.0, ONE), (-1.0, side)])
    expected = slow.mean([slow.metric(m) for m in one]) - slow.mean([slow.metric(m) for m in rows])
    assert found.value == pytest.approx(expected, rel=1e-12)
    assert found.variance == pytest.approx(variance, rel=CLOSE)
    half = found.value - found.interval.low
    t = half / math.sqrt(found.variance)
    assert slow.student_two_sided(t, freedom) == pytest.approx(0.05, rel=CLOSE)
    tail = slow.student_two_sided(found.value / math.sqrt(variance), freedom)
    assert math.log(found.p) == pytest.approx(math.log(tail), rel=CLOSE)
    for g, name in enumerate(together.groups):
        rise = slow.mean([slow.group_metric(m, name) for m in one]) - slow.mean(
            [slow.group_metric(m, name) for m in rows]
        )
        assert found.by_group[g] == pytest.approx(rise, rel=1e-12)


def test_variance_is_about_that_of_a_pigeonhole_bootstrap() -> None:
    rng = random.Random(3)
    one, original = recipe(rng, seeds=12, rise=0.3, sizes=(40, 40)), recipe(rng, seeds=1, rise=0.0, sizes=(40, 40))
    side: Side = {s: s for s in range(12)}
    both = panel([observations(seen) for seen in [*one, *original]], where="all")
    fast = estimate(both, [(1.0, side), (-1.0, {None: 12})]).variance
    assert fast == pytest.approx(slow.pigeonhole([(1.0, one), (-1.0, original)], 1500, 5), rel=0.15)


def test_share_of_damage_taken_back(measured: tuple[list[list], ...], together: object) -> None:
    one, other, original = measured
    found = recovered(together, ONE, OTHER, ORIGINAL, worse=1.0)
    assert isinstance(found, Interval)
    base = slow.metric(original[0])
    damage = [slow.mean([slow.metric(m) for m in seeds]) - base for seeds in (one, other)]
    ratio = damage[0] / damage[1]

    def parts(theta: float) -> tuple[float, float]:
        terms = [(1.0, one), (-theta, other), (theta - 1.0, original)]
        return slow.satterthwaite([*slow.document_parts(terms), *slow.paired_seeds(terms)])

    freedom = parts(ratio)[1]
    critical = slow.ends(lambda t: 0.05 - slow.student_two_sided(t, freedom), 0.0, 20.0)

    def told_apart(theta: float) -> float:
        return abs(damage[0] - theta * damage[1]) - critical * math.sqrt(parts(theta)[0])

    low, high = (slow.ends(told_apart, ratio, outside) for outside in (ratio - 2, ratio + 2))
    assert found.estimate == pytest.approx(1 - ratio, rel=1e-9)
    assert found.estimate - found.low == pytest.approx(high - ratio, rel=CLOSE)
    assert found.high - found.estimate == pytest.approx(ratio - low, rel=CLOSE)


@pytest.mark.parametrize(
    "p", [[0.01, 0.04, 0.03, 0.005], [0.5, 0.5, 0.02, 0.02, 1.0], [0.2], [0.0, 0.9, 0.04, 0.012, 0.3]]
)
def test_holm(p: list[float]) -> None:
    assert holm(p) == pytest.approx(slow.closed_bonferroni(p))


@pytest.mark.parametrize("higher", [False, True])
@pytest.mark.parametrize("ties", [False, True])
def test_friedman_and_mean_ranks(higher: bool, ties: bool) -> None:
    rng = random.Random(11)
    blocks = [[rng.gauss(0.4 * j, 1) for j in range(5)] for _ in range(7)]
    if ties:
        blocks = [[round(value) for value in block] for block in blocks]
    names = "abcde"
    found = rank([dict(zip(names, block, strict=True)) for block in blocks], higher_is_better=higher)
    assert found is not None
    signed = [[-value if higher else value for value in block] for block in blocks]
    ranked = [slow.ranks(block) for block in signed]
    expected = {name: slow.mean([row[j] for row in ranked]) for j, name in enumerate(names)}
    assert dict(zip(found.recipes, found.mean_ranks, strict=True)) == pytest.approx(expected)
    assert list(found.mean_ranks) == sorted(found.mean_ranks)
    assert found.p == pytest.approx(slow.chi_square_tail(slow.friedman(signed), 4), rel=1e-9)
