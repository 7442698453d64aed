"""Paired statistics: how often they are wrong, on made-up measurements where the truth is known."""

from __future__ import annotations

import numpy as np
import pytest

from dernkit.compare.statistics import Estimate, Interval, Panel, Side, estimate, holm, panel, recovered
from dernkit.errors import CheckpointError
from dernkit.observations import Observations
from tests.unit.compared import Spread, observe

TRIALS = 500
"""A share of 5 % of these has a standard error of 1 %."""


def trials(spread: Spread, *, seeds: int, harm: float = 0.0, documents: int = 80, skewed: bool = False) -> Panel:
    """In each trial two recipes on new text: one does more harm than the other, by ``harm`` in all text like this."""
    rng = np.random.default_rng(5)
    weights = rng.uniform(50, 500, documents)
    measured = []
    for _ in range(TRIALS):
        base = rng.normal(1.5, 0.4, documents)
        drawn = rng.exponential(1, documents) - 1 if skewed else rng.normal(0, 1, documents)
        for effect in (harm + spread.documents * drawn, 0.0):
            for _ in range(seeds):
                luck = rng.normal(0, spread.seeds) + rng.normal(0, spread.both, documents)
                measured.append(observe(base + effect + luck, weights))
    return panel(measured, where="trials", resamples=300)


def sides(trial: int, seeds: int, *, paired: bool) -> tuple[Side, Side]:
    first = 2 * seeds * trial
    other = {seed if paired else seed + seeds: first + seeds + seed for seed in range(seeds)}
    return {seed: first + seed for seed in range(seeds)}, other  # type: ignore[return-value]


def differences(seen: Panel, *, seeds: int, paired: bool = True) -> list[Estimate]:
    both = (sides(trial, seeds, paired=paired) for trial in range(TRIALS))
    return [estimate(seen, [(1.0, one), (-1.0, other)]) for one, other in both]


def share(found: list[bool]) -> float:
    return float(np.mean(found))


@pytest.mark.parametrize("paired", [False, True], ids=["other seeds", "paired seeds"])
@pytest.mark.parametrize("both", [0.0, 0.05], ids=["seeds alike on all documents", "seeds and documents together"])
def test_a_recipe_does_not_differ_from_itself_under_other_seeds(paired: bool, both: float) -> None:
    seen = trials(Spread(documents=0.0, seeds=0.05, both=both), seeds=3)
    found = differences(seen, seeds=3, paired=paired)
    assert 0.02 <= share([each.p < 0.05 for each in found]) <= 0.075
    assert share([each.interval.low <= 0 <= each.interval.high for each in found]) >= 0.925
    without_seeds = [abs(each.value) > 1.96 * each.variances[: len(seen.groups)].sum() ** 0.5 for each in found]
    assert share(without_seeds) > 0.3


@pytest.mark.parametrize("skewed", [False, True], ids=["even", "skewed"])
@pytest.mark.parametrize(
    ("spread", "seeds"),
    [
        (Spread(documents=0.3, seeds=0.01, both=0.02), 3),
        (Spread(documents=0.3, seeds=0.03, both=0.05), 3),
        (Spread(documents=0.3, seeds=0.03, both=0.05), 5),
        (Spread(documents=0.3, seeds=0.0, both=0.0), 1),
    ],
)
def test_intervals_hold_the_true_difference_in_95_of_100_trials(spread: Spread, seeds: int, skewed: bool) -> None:
    found = differences(trials(spread, seeds=seeds, harm=0.1, skewed=skewed), seeds=seeds)
    assert 0.92 <= share([each.interval.low <= 0.1 <= each.interval.high for each in found]) <= 0.98


@pytest.mark.parametrize(("seeds", "most"), [(2, 0.13), (3, 0.08), (5, 0.06)])
@pytest.mark.parametrize("part", [0.5, 0.9, 1.0])
def test_where_seeds_make_most_of_the_variance_false_differences_are_as_documented(
    seeds: int, most: float, part: float
) -> None:
    """``part`` of the variance is the seeds', the rest that of 896 documents."""
    rng, count = np.random.default_rng(6), 4000
    freedom = np.array([896.0, seeds - 1.0])
    drawn = np.array([1 - part, part]) * rng.chisquare(freedom, (count, 2)) / freedom
    wrong = [
        Estimate(float(value), np.zeros(1), variances, freedom, seeds).p < 0.05
        for value, variances in zip(rng.normal(size=count), drawn, strict=True)
    ]
    assert share(wrong) <= most + 0.01


def test_the_interval_holds_0_where_p_is_above_5_percent() -> None:
    for each in differences(trials(Spread(0.3, 0.03, 0.05), seeds=3, harm=0.1), seeds=3):
        assert (each.p > 0.05) == (each.interval.low <= 0 <= each.interval.high)


def test_a_planted_difference_is_found() -> None:
    found = differences(trials(Spread(documents=0.1, seeds=0.005, both=0.02), seeds=3, harm=0.05), seeds=3)
    assert share([each.p < 0.05 and each.value > 0 for each in found]) > 0.9


def test_intervals_of_recovered_shares_hold_the_true_share_in_95_of_100_trials() -> None:
    """Of a baseline that does 0.2 bits of damage, a recipe takes back 0.05: a quarter."""
    rng = np.random.default_rng(2)
    weights = rng.uniform(50, 500, 80)
    measured = []
    for _ in range(TRIALS):
        base = rng.normal(1.5, 0.4, 80)
        shared = rng.normal(0, 0.1, 80)
        measured.append(observe(base, weights))
        for harm in (0.15, 0.2):
            for _ in range(3):
                luck = rng.normal(0, 0.01) + rng.normal(0, 0.05, 80)
                measured.append(observe(base + harm + shared + luck, weights))
    seen = panel(measured, where="trials", resamples=300)
    found = []
    for first in range(0, len(measured), 7):
        recipe, against = ({s: first + start + s for s in range(3)} for start in (1, 4))
        taken = recovered(seen, recipe, against, {None: first}, worse=1.0)
        found.append(taken is not None and taken.low <= 0.25 <= taken.high)
    assert 0.92 <= share(found) <= 0.98


def made(harms: tuple[float, ...], *, seeds: int = 3, spread: float = 0.05, documents: int = 60) -> Panel:
    """An original, then the seeds of each recipe."""
    rng = np.random.default_rng(9)
    weights, base = rng.uniform(50, 500, documents), rng.normal(1.5, 0.4, documents)
    measured = [observe(base, weights)]
    for harm in harms:
        measured += [observe(base + harm + rng.normal(0, spread, documents), weights) for _ in range(seeds)]
    return panel(measured, where="made")


def test_the_ends_of_a_recovered_share_are_where_damage_is_no_longer_told_apart() -> None:
    seen = made((0.1, 0.3))
    one, against, original = {0: 1, 1: 2, 2: 3}, {0: 4, 1: 5, 2: 6}, {None: 0}
    taken = recovered(seen, one, against, original, worse=1.0)
    assert taken is not None

    def rest(share: float) -> Estimate:
        return estimate(seen, [(1.0, one), (share - 1, against), (-share, original)])

    t = rest(taken.estimate).t
    assert rest(taken.estimate).value == pytest.approx(0, abs=1e-12)
    for end in (taken.low, taken.high):
        assert abs(rest(end).value) == pytest.approx(t * rest(end).variance ** 0.5, rel=1e-9)


@pytest.mark.parametrize("harm", [0.0, -0.2])
def test_a_share_of_no_damage_is_not_given(harm: float) -> None:
    seen = made((0.1, harm))
    assert recovered(seen, {0: 1, 1: 2, 2: 3}, {0: 4, 1: 5, 2: 6}, {None: 0}, worse=1.0) is None


def test_a_measurement_does_not_differ_from_itself() -> None:
    seen = made((0.1,))
    both = estimate(seen, [(1.0, {0: 1, 1: 2, 2: 3}), (-1.0, {0: 1, 1: 2, 2: 3})])
    assert (both.value, both.p, both.interval) == (0.0, 1.0, Interval(0.0, 0.0, 0.0))


@pytest.mark.parametrize(
    ("one", "other", "seeds", "samples"),
    [
        ({0: 1, 1: 2, 2: 3}, {0: 4, 1: 5, 2: 6}, 3, 1),
        ({0: 1, 1: 2, 2: 3}, {1: 4, 2: 5, 7: 6}, 2, 1),
        ({0: 1, 1: 2, 2: 3}, {3: 4, 4: 5, 5: 6}, 3, 2),
        ({0: 1, 1: 2, 2: 3}, {2: 4, 4: 5, 5: 6}, 3, 2),
        ({0: 1, 1: 2, 2: 3}, {0: 4}, 1, 1),
        ({0: 1}, {0: 4}, 1, 0),
        ({0: 1, 1: 2, 2: 3}, {None: 0}, 3, 1),
    ],
    ids=["the same", "two shared", "none shared", "one shared", "one has one", "one each", "an original"],
)
def test_seeds_are_paired_where_they_can_be(one: Side, other: Side, seeds: int, samples: int) -> None:
    seen = made((0.1, 0.3))
    found = estimate(seen, [(1.0, one), (-1.0, other)])
    assert (found.seeds, len(found.variances) - len(seen.groups)) == (seeds, samples)


def test_the_order_of_documents_does_not_matter() -> None:
    rng = np.random.default_rng(4)
    weights = rng.uniform(50, 500, 40)
    given = [observe(rng.normal(1, 0.2, 40), weights) for _ in range(2)]
    mixed = [shuffled(each, rng.permutation(40)) for each in given]
    first, second = panel(given, where="given"), panel(mixed, where="mixed")
    np.testing.assert_array_equal(first.replicates, second.replicates)
    assert (first.groups, first.documents) == (second.groups, second.documents)


def shuffled(seen: Observations, order: np.ndarray) -> Observations:
    names, groups = (tuple(field[i] for i in order) for field in (seen.documents, seen.groups))
    return Observations(names, groups, seen.values[order], seen.weights[order])


def test_resamples_in_parts_are_those_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = made((0.1,))
    monkeypatch.setattr("dernkit.compare.statistics._CHUNK", 1000)
    np.testing.assert_allclose(made((0.1,)).replicates, whole.replicates, rtol=1e-12)


def test_groups_of_two_documents_have_the_right_variance() -> None:
    """(x₁ − x₂)² / 4 is the variance of a mean of two; drawing two of two would give half of it."""
    seen = panel([observe(np.array([1.0, 1.6, 2.0, 2.4]), np.ones(4), groups=2)], where="few", resamples=40_000)
    found = estimate(seen, [(1.0, {None: 0})])
    np.testing.assert_allclose(found.variances * 4, [0.25, 0.16], rtol=0.02)
    np.testing.assert_array_equal(found.freedom, [1.0, 1.0])


def test_holm_keeps_order_and_what_is_adjusted_is_never_below_p() -> None:
    assert holm([]) == []
    p = [0.2, 0.001, 0.04, 0.04]
    adjusted = holm(p)
    assert adjusted == pytest.approx([0.2, 0.004, 0.12, 0.12])


def test_other_documents_are_refused() -> None:
    seen = observe(np.ones(8), np.ones(8))
    renamed = Observations((*seen.documents[:-1], "other"), seen.groups, seen.values, seen.weights)
    with pytest.raises(CheckpointError, match=r"a, b: what is compared .* Got '0007' in some of them only instead\."):
        panel([seen, renamed], where="a, b")
    twice = Observations(("0", *seen.documents[1:-1], "0"), ("x",) * 8, seen.values, seen.weights)
    with pytest.raises(CheckpointError, match=r"Got a document twice instead\."):
        panel([twice, twice], where="a, b")
    moved = Observations(seen.documents, ("x",) * 8, seen.values, seen.weights)
    with pytest.raises(CheckpointError, match=r"same documents in the same domains"):
        panel([seen, moved], where="a, b")


def test_a_domain_of_one_document_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"Got 'domain 3' with 1 instead\. Divide its text"):
        panel([observe(np.ones(7), np.ones(7))], where="a, b")
