"""From the rows of a comparison to what is said about them."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from dernkit.compare.analysis import Analysis, Comparison, analyse, compare_pair
from dernkit.compare.rows import ORIGINAL, Row
from dernkit.errors import CheckpointError, RecipeError
from tests.unit.compared import METRIC, Spread, comparison, observe, row

HARMS = {"prune": 0.3, "better": 0.2, "worse": 0.4, "alike": 0.3}
PLACES = {"one": (0.75, 0.5), "two": (0.5,), "three": (0.5,)}
CLEAR = Spread(documents=0.05, seeds=0.002, both=0.02)


def analysed(rows: list[Row], baseline: str = "prune") -> Analysis:
    return analyse(rows, metric=METRIC, baseline=baseline)


@pytest.fixture(scope="module")
def clear() -> Analysis:
    return analysed(comparison(HARMS, places=PLACES, spread=CLEAR))


def pair(rows: list[Row], recipe: str, against: str, **changes: object) -> Comparison:
    fields: dict[str, object] = {"model": "tiny", "keep": 0.5, "calibration": "mixed", "metric": METRIC}
    return compare_pair(rows, recipe=recipe, against=against, **(fields | changes))  # type: ignore[arg-type]


def test_planted_differences_are_found_in_every_place(clear: Analysis) -> None:
    verdicts = {name: [one.verdict for one in clear.against_baseline if one.recipe == name] for name in HARMS}
    assert verdicts == {
        "prune": [],
        "better": ["better"] * 4,
        "worse": ["worse"] * 4,
        "alike": ["undecided"] * 4,
    }
    for one in clear.against_baseline:
        expected = HARMS[one.recipe] - HARMS["prune"]
        assert one.difference.estimate == pytest.approx(expected, abs=0.025)
        assert 0.01 < one.difference.high - one.difference.low < 0.05
        assert (one.against, one.documents, one.seeds) == ("prune", 120, 3)
    taken = [one.recovered for one in clear.against_baseline if one.recipe == "better"]
    assert all(share and 0.2 < share.low < share.estimate < share.high < 0.45 for share in taken)


def test_all_recipes_do_damage(clear: Analysis) -> None:
    assert {(one.recipe, one.verdict) for one in clear.against_original} == {(name, "worse") for name in HARMS}
    assert all(one.against == ORIGINAL and one.recovered is None for one in clear.against_original)


def test_cells_hold_what_was_measured_and_rises_are_those_of_their_domains() -> None:
    rows = comparison(HARMS, spread=CLEAR)
    found = analysed(rows)
    assert [cell.recipe for cell in found.cells] == list(HARMS)
    for cell in found.cells:
        seeds = [one.observations[METRIC] for one in rows if one.recipe == cell.recipe]
        base = rows[0].observations[METRIC]
        assert cell.value is not None and cell.rise is not None
        assert cell.value.estimate == pytest.approx(np.mean([seen.mean() for seen in seeds]))
        assert cell.rise.estimate == pytest.approx(cell.value.estimate - base.mean())
        assert cell.rise.high - cell.rise.low < cell.value.high - cell.value.low
        for domain, rise in cell.by_group.items():
            mean = np.mean([seen.by_group()[domain] for seen in seeds])
            assert rise == pytest.approx(mean - base.by_group()[domain])
        assert (cell.seeds, cell.documents, cell.layer_error, cell.moved) == (3, 120, 0.75, 0.25)
        assert (cell.parameters, cell.bytes, cell.expert_bytes, cell.refused) == (10, 20, 8, "")
    (original,) = found.originals
    assert (original.model, original.keep, original.seeds) == ("tiny", 1.0, 1)
    assert original.value is not None
    assert original.value.estimate == pytest.approx(rows[0].observations[METRIC].mean())


def test_higher_is_better_turns_verdicts_round() -> None:
    found = analysed(comparison(HARMS, spread=CLEAR, higher=True))
    assert found.higher_is_better
    assert {one.recipe: one.verdict for one in found.against_baseline} == {
        "better": "better",
        "worse": "worse",
        "alike": "undecided",
    }
    assert all(cell.rise and cell.rise.high < 0 for cell in found.cells)
    taken = next(one.recovered for one in found.against_baseline if one.recipe == "better")
    assert taken is not None and taken.estimate == pytest.approx(1 / 3, abs=0.05)


def test_a_family_is_one_place_and_one_thing_compared_with(clear: Analysis) -> None:
    there = [one for one in clear.against_baseline if (one.model, one.keep) == ("one", 0.5)]
    smallest = min(there, key=lambda one: one.p)
    assert len(there) == 3
    assert smallest.p_adjusted == pytest.approx(3 * smallest.p)
    assert all(one.p_adjusted >= one.p for one in there)


def test_one_pair_by_itself_is_the_one_of_the_analysis_without_correction(clear: Analysis) -> None:
    rows = comparison(HARMS, places=PLACES, spread=CLEAR)
    one = next(each for each in clear.against_baseline if each.model == "two" and each.recipe == "better")
    alone = pair(rows, "better", "prune", model="two")
    assert alone.p_adjusted == alone.p
    assert replace(alone, p_adjusted=one.p_adjusted) == one
    turned = pair(rows, "prune", "better", model="two")
    assert turned.difference.estimate == pytest.approx(-one.difference.estimate)
    assert turned.verdict == "worse"
    assert pair(rows, "better", ORIGINAL, model="two").verdict == "worse"


def test_recipes_that_decide_alike_are_undecided() -> None:
    """Also where only the order of sums differs: every document by the same last bit."""
    rows = comparison({"prune": 0.3}, spread=CLEAR)
    same = [replace(one, recipe="same") for one in rows[1:]]
    nearly = []
    for one in rows[1:]:
        seen = one.observations[METRIC]
        nearly.append(
            replace(one, recipe="nearly", observations={METRIC: replace(seen, values=seen.values * (1 + 2e-8))})
        )
    found = {one.recipe: one for one in analysed([*rows, *same, *nearly]).against_baseline}
    assert (found["same"].p, found["same"].difference.estimate) == (1.0, 0.0)
    assert [found[name].verdict for name in ("same", "nearly")] == ["undecided"] * 2


def test_ranks_are_over_places(clear: Analysis) -> None:
    assert clear.ranking is not None
    assert clear.ranking.blocks == 4
    assert clear.ranking.recipes[0] == "better"
    assert clear.ranking.recipes[-1] == "worse"


def test_refused_recipes_have_cells_and_nothing_else() -> None:
    rows = comparison(HARMS, places={"one": (0.5,), "two": (0.5,)}, spread=CLEAR)
    at = next(i for i, one in enumerate(rows) if (one.model, one.recipe) == ("two", "better"))
    rows[at : at + 3] = [row("better", None, model="two", seed=seed) for seed in range(3)]
    rows[at + 3] = row("worse", None, model="two")
    found = analysed(rows)
    refused, partly = (cell for cell in found.cells if cell.refused)
    assert (refused.recipe, refused.value, refused.rise, dict(refused.by_group), refused.seeds) == (
        "better",
        None,
        None,
        {},
        0,
    )
    assert refused.refused.startswith("plan.keep: must be 2.")
    assert (partly.recipe, partly.seeds, partly.value is None) == ("worse", 2, False)
    assert [one.model for one in found.against_baseline if one.recipe == "better"] == ["one"]
    assert [one.seeds for one in found.against_baseline if one.recipe == "worse"] == [3, 2]
    assert found.ranking is not None and found.ranking.left_out == ("better",)
    assert "Refused at least once: better and worse." in found.sentence


def test_where_the_baseline_was_refused_nothing_is_compared_with_it() -> None:
    rows = comparison(HARMS, places={"one": (0.5,), "two": (0.5,)}, spread=CLEAR)
    rows = [
        row("prune", None, model="two", seed=one.seed) if (one.model, one.recipe) == ("two", "prune") else one
        for one in rows
    ]
    found = analysed(rows)
    assert {one.model for one in found.against_baseline} == {"one"}
    assert {one.model for one in found.against_original} == {"one", "two"}


def test_a_comparison_of_the_baseline_alone_says_so() -> None:
    found = analysed(comparison({"prune": 0.3}))
    assert (found.against_baseline, found.ranking) == ((), None)
    assert "nothing can be said: no other recipe was measured where prune was" in found.sentence


def test_the_sentence_says_who_wins_where_and_by_how_much(clear: Analysis) -> None:
    start = f"By {METRIC} (lower is better), better does best: better than prune in 4 of 4 places, by "
    assert clear.sentence.startswith(start)
    wins = sorted(
        (one for one in clear.against_baseline if one.recipe == "better"), key=lambda one: one.difference.high
    )
    for one, share in ((wins[0], "to"), (wins[-1], "by")):
        estimate, low, high = (abs(end) for end in (one.difference.estimate, one.difference.low, one.difference.high))
        text = f"{share} −{estimate:.3f} [−{low:.3f}, −{high:.3f}] ({one.model} at keep {one.keep:g} (mixed))"
        assert text in clear.sentence
    assert "Worse somewhere: worse. Nowhere told apart from prune: alike." in clear.sentence
    assert clear.sentence.endswith("Measured on 120 documents with 3 calibration seeds; 95 % intervals.")


def test_the_sentence_names_undecided_places_and_a_single_seed() -> None:
    found = analysed(comparison({"prune": 0.3, "alike": 0.3}, seeds=(0,), places={"one": (0.75, 0.5)}))
    assert "no recipe is shown to be better than prune; alike comes nearest, off by " in found.sentence
    assert "; undecided in one at keep 0.75 (mixed) and one at keep 0.5 (mixed)." in found.sentence
    assert found.sentence.endswith("Where there is one seed, intervals say nothing about other calibrations.")


def test_the_sentence_of_one_place_says_that_nothing_is_better() -> None:
    sentence = analysed(comparison({"prune": 0.2, "other": 0.3}, spread=CLEAR)).sentence
    assert "no recipe is shown to be better than prune; other comes nearest, off by 0.1" in sentence
    assert "; worse in tiny at keep 0.5 (mixed)." in sentence


def test_the_sentence_names_a_recipe_that_wins_in_one_place_and_loses_in_another() -> None:
    rows = comparison({"prune": 0.3, "mixed": 0.2}, places={"one": (0.5,)}, spread=CLEAR)
    rows += comparison({"prune": 0.3, "mixed": 0.4}, places={"two": (0.5,)}, spread=CLEAR)
    sentence = analysed(rows).sentence
    assert "mixed does best: better than prune in 1 of 2 places, by −" in sentence
    assert "; worse in two at keep 0.5 (mixed)." in sentence


def test_models_without_the_metric_are_named() -> None:
    rows = comparison(HARMS, spread=CLEAR)
    other = [replace(one, model="other", observations={}) for one in rows]
    found = analysed([*rows, *other])
    assert found.unmeasured == ("other",)
    assert "Not measured by this metric: other." in found.sentence
    assert {cell.model for cell in found.cells} == {"tiny"}


@pytest.mark.parametrize(
    ("change", "error", "sentence"),
    [
        ("no original", CheckpointError, r"tiny: must have one row 'original' .* Got 0 of them instead\."),
        ("two originals", CheckpointError, r"Got 2 of them instead\."),
        ("original without", CheckpointError, r"Got one without it instead\."),
        (
            "one without",
            CheckpointError,
            r"prune, seed 1: must have one row.* Got one without perplexity/bits_per_byte",
        ),
        ("twice", CheckpointError, r"prune, seed 0: must have one row.* Got two rows instead\."),
        ("documents", CheckpointError, r"tiny at keep 0\.5 \(mixed\), perplexity/bits_per_byte: what is compared"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(change: str, error: type[Exception], sentence: str) -> None:
    rows = comparison({"prune": 0.3, "better": 0.2})
    changed = {
        "no original": rows[1:],
        "two originals": [rows[0], *rows],
        "original without": [replace(rows[0], observations={}), *rows[1:]],
        "one without": [*rows[:2], replace(rows[2], observations={}), *rows[3:]],
        "twice": [*rows, rows[1]],
        "documents": [*rows[:2], replace(rows[2], observations={METRIC: observe(np.ones(8), np.ones(8))}), *rows[3:]],
    }[change]
    with pytest.raises(error, match=sentence):
        analysed(changed)


def test_unknown_names_are_refused_with_the_near_one() -> None:
    rows = comparison({"prune": 0.3, "better": 0.2})
    with pytest.raises(RecipeError, match=r"Got 'perplexity/bits' instead\. Did you mean 'perplexity/bits_per_byte'\?"):
        analyse(rows, metric="perplexity/bits", baseline="prune")
    with pytest.raises(
        RecipeError, match=r"baseline: must be one of better, prune\. Got 'prun' instead\. Did you mean"
    ):
        analysed(rows, baseline="prun")
    with pytest.raises(RecipeError, match=r"baseline: .* Got 'original' instead\."):
        analysed(rows, baseline=ORIGINAL)
    with pytest.raises(RecipeError, match=r"model: must be one of tiny\. Got 'big'"):
        pair(rows, "better", "prune", model="big")
    with pytest.raises(RecipeError, match=r"tiny at keep 0\.25 \(mixed\): recipe: must be one of original\."):
        pair(rows, "better", "prune", keep=0.25)
    refused = [*rows, row("cut", None)]
    with pytest.raises(RecipeError, match=r"cut: must have been measured\. Got 'plan\.keep: must be 2\."):
        pair(refused, "cut", "prune")
    with pytest.raises(RecipeError, match=r"metric: .* \(there is none\)"):
        analyse([replace(one, observations={}) for one in rows], metric=METRIC, baseline="prune")


def test_rows_in_another_order_give_the_same_comparisons() -> None:
    rows = comparison(HARMS, spread=CLEAR)
    found = {one.recipe: one for one in analysed(rows[::-1]).against_baseline}
    for one in analysed(rows).against_baseline:
        assert found[one.recipe].p == pytest.approx(one.p, rel=1e-6)
        assert found[one.recipe].difference.low == pytest.approx(one.difference.low)


def test_forty_recipes_of_nine_hundred_documents_take_seconds() -> None:
    rows = comparison({f"recipe {i}": 0.1 for i in range(40)}, documents=900)
    started = time.process_time()
    analysed(rows, baseline="recipe 0")
    assert time.process_time() - started < 10
