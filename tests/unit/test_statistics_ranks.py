"""Ranks of recipes across models."""

from __future__ import annotations

import pytest

from dernkit.compare.ranks import critical_difference, rank


@pytest.mark.parametrize(
    ("recipes", "quantile"), [(2, 1.960), (3, 2.343), (4, 2.569), (5, 2.728), (6, 2.850), (7, 2.949), (10, 3.164)]
)
def test_the_critical_difference_is_that_of_demsars_table(recipes: int, quantile: float) -> None:
    """Demšar (2006), table 5 (a): quantiles for 5 %; his example of 4 classifiers on 14 data sets has 1.25."""
    assert critical_difference(recipes, 14) == pytest.approx(
        quantile * (recipes * (recipes + 1) / (6 * 14)) ** 0.5, rel=5e-4
    )
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)


def blocks(count: int, *, order: str = "abcd") -> list[dict[str, float]]:
    """The earlier in ``order``, the lower in every block."""
    return [{name: float(place + block) for place, name in enumerate(order)} for block in range(count)]


def test_the_best_recipe_comes_first_and_the_far_ones_are_apart() -> None:
    found = rank(blocks(12), higher_is_better=False)
    assert found is not None
    assert found.recipes == ("a", "b", "c", "d")
    assert found.mean_ranks == (1, 2, 3, 4)
    assert found.p < 1e-6
    assert 1 < found.critical_difference < 2
    assert found.cliques == (("a", "b"), ("b", "c"), ("c", "d"))


def test_higher_is_better_turns_ranks_round() -> None:
    found = rank(blocks(12), higher_is_better=True)
    assert found is not None
    assert found.recipes == ("d", "c", "b", "a")


def test_where_nothing_differs_all_are_one_clique() -> None:
    found = rank([dict.fromkeys("abcd", 1.0)] * 3, higher_is_better=False)
    assert found is not None
    assert (found.p, found.mean_ranks, found.cliques) == (1.0, (2.5,) * 4, (("a", "b", "c", "d"),))


def test_with_few_blocks_no_ranks_are_told_apart() -> None:
    found = rank(blocks(2, order="abcdefgh"), higher_is_better=False)
    assert found is not None
    assert found.critical_difference > 7 == found.mean_ranks[-1] - found.mean_ranks[0]
    assert found.cliques == (found.recipes,)


def test_recipes_that_are_missing_somewhere_are_left_out_and_named() -> None:
    given = blocks(5, order="abcde")
    del given[2]["b"]
    given[4] = {"late": 0.0, **given[4]}
    found = rank(given, higher_is_better=False)
    assert found is not None
    assert found.recipes == ("a", "c", "d", "e")
    assert found.left_out == ("b", "late")
    assert found.mean_ranks == (1, 2, 3, 4)


@pytest.mark.parametrize("given", [[], blocks(1), blocks(5, order="ab")], ids=["nothing", "one block", "two recipes"])
def test_too_little_gives_no_ranking(given: list[dict[str, float]]) -> None:
    assert rank(given, higher_is_better=False) is None
