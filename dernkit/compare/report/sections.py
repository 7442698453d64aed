"""The parts of a report in their order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dernkit.compare.report import facts, tables
from dernkit.compare.report.alike import alike, cosines
from dernkit.compare.report.domains import domains
from dernkit.compare.report.drawing import Picture
from dernkit.compare.report.facts import Listing
from dernkit.compare.report.inputs import Results
from dernkit.compare.report.layers import errors, moved, scores, use
from dernkit.compare.report.pareto import pareto
from dernkit.compare.report.ranking import ranking
from dernkit.compare.report.stable import stable
from dernkit.compare.report.tables import Table


@dataclass(frozen=True, slots=True)
class Section:
    """A part of the report; what is empty is not shown."""

    name: str
    """Of its anchor."""
    title: str
    text: str = ""
    tables: tuple[Table, ...] = ()
    pictures: tuple[Picture, ...] = ()
    listings: tuple[Listing, ...] = ()
    note: str = ""
    """What is said where there is nothing to show."""


def sections(results: Results) -> list[Section]:
    """All parts that have something to say."""
    return [part for part in _sections(results) if part.tables or part.pictures or part.listings or part.note]


def _sections(results: Results) -> Iterator[Section]:
    worse = "falls" if results.analysis.higher_is_better else "rises"
    yield Section("overview", "At a glance", tables=(tables.overview(results),) if results.blocks else ())
    yield Section("pareto", "Quality against size", pictures=tuple(pareto(results)))
    yield Section(
        "tables",
        "Every recipe",
        f"Damage means that {results.analysis.metric} {worse}. Recipes with the least damage stand first; the "
        f"baseline is {results.analysis.baseline}. {tables.LEGEND}",
        tables=tuple(tables.blocks(results)),
    )
    refused = tables.refused(results)
    yield Section("refused", "What was refused", tables=(refused,) if refused else ())
    yield _ranks(results)
    yield Section(
        "domains",
        "Damage by domain",
        "How much of the change from the original falls on each domain or task; below 0 is a gain.",
        pictures=tuple(domains(results)),
    )
    yield from _layers(results)
    yield Section(
        "alike",
        "Are neurons of different experts alike?",
        "What recombination lives on: the higher the values, the better a neuron of a dropped expert fits another one.",
        pictures=tuple(
            picture for model in results.models for draw in (alike, cosines) for picture in draw(results, model)
        ),
    )
    yield Section(
        "stability",
        "How many calibration tokens are enough?",
        "Where the lines reach 1 early, more tokens would not change which experts stay.",
        pictures=tuple(stable(results)),
    )
    yield Section(
        "again",
        "How to make it again",
        "The bench file names models, recipes, ratios, seeds and calibration sets; each row of the results holds the "
        "digest of all that it is made from, its recipe in full, and every document's measurement.",
        tables=(facts.made_from(results), facts.models(results)),
        listings=tuple(facts.recipes(results)),
    )


def _ranks(results: Results) -> Section:
    found = results.analysis.ranking
    if found is None:
        return Section("ranks", "Ranks", note="Ranks need three recipes that were measured in two blocks or more.")
    out = f" Left out, since a block lacks them: {', '.join(found.left_out)}." if found.left_out else ""
    return Section(
        "ranks", "Ranks", f"Which recipe is best across models and ratios?{out}", pictures=tuple(ranking(results))
    )


def _layers(results: Results) -> Iterator[Section]:
    for i, model in enumerate(results.models):
        pictures = tuple(picture for draw in (scores, moved, use, errors) for picture in draw(results, model))
        text = "Which experts are kept, what moved, which experts tokens use, and what compression costs in each layer."
        yield Section(f"layers-{i + 1}", f"Layer by layer: {model}", text, pictures=pictures)
