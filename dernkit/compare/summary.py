"""A comparison in a few sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dernkit.compare.findings import Analysis, Cell, Comparison
from dernkit.compare.statistics import Interval

_NAMED = 4
"""Names in a list, before it only says how many more there are."""


def summary(analysis: Analysis) -> str:
    """Who wins where, by how much, and where nothing can be said: ``sentence`` of the analysis."""
    places = {_place(cell) for cell in analysis.cells if cell.value is not None}
    direction = "higher" if analysis.higher_is_better else "lower"
    parts = [f"By {analysis.metric} ({direction} is better) in {_count(len(places), 'place')}:"]
    best = _best(analysis)
    if best is None:
        parts.append(f"nothing can be said, as no recipe was measured next to {analysis.baseline}.")
    else:
        parts += [_headline(analysis, best), *_others(analysis, best)]
    return " ".join([*parts, *_scope(analysis)])


def _best(analysis: Analysis) -> str | None:
    """The recipe with the best mean rank; without ranks, the one with the best mean difference from the baseline."""
    compared = dict.fromkeys(found.recipe for found in analysis.against_baseline)
    for recipe in analysis.ranking.recipes if analysis.ranking else ():
        if recipe in compared:
            return recipe
    sign = -1.0 if analysis.higher_is_better else 1.0

    def mean(recipe: str) -> float:
        differences = [found.difference.estimate for found in _of(analysis, recipe)]
        return sign * sum(differences) / len(differences)

    return min(compared, key=mean, default=None)


def _headline(analysis: Analysis, recipe: str) -> str:
    found = sorted(_of(analysis, recipe), key=lambda one: abs(one.difference.estimate), reverse=True)
    undecided = [one for one in found if one.verdict == "undecided"]
    better = sum(one.verdict == "better" for one in found)
    first = f"{recipe} against {analysis.baseline} is better in {better} of {len(found)}"
    worse = [one for one in found if one.verdict == "worse"]
    first += f", worse in {len(worse)}{_where(worse)}, undecided in {len(undecided)}{_where(undecided)};"
    spread = (
        f"{_difference(found[0])}" if len(found) == 1 else f"from {_difference(found[-1])} to {_difference(found[0])}"
    )
    return f"{first} the difference is {spread}.{_taken_back(found)}"


def _difference(one: Comparison) -> str:
    return f"{_written(one.difference)} (adjusted p {_p(one.p_adjusted)}) on {_place(one)}"


def _taken_back(found: Sequence[Comparison]) -> str:
    shares = sorted((one.recovered for one in found if one.recovered), key=lambda share: share.estimate)
    if not shares:
        return f" {found[0].against} does no damage there that could be taken back."
    text = f"{_percent(shares[0])}" if len(shares) == 1 else f"{_percent(shares[0])} to {_percent(shares[-1])}"
    return f" Of the damage of {found[0].against} it takes back {text}."


def _others(analysis: Analysis, best: str) -> list[str]:
    said = []
    ranking = analysis.ranking
    if ranking is not None:
        alike = {name for clique in ranking.cliques if best in clique for name in clique} - {best}
        tail = (
            f"; by ranks it cannot be told apart from {_list(sorted(alike, key=ranking.recipes.index))}"
            if alike
            else ""
        )
        rank = ranking.mean_ranks[ranking.recipes.index(best)]
        said.append(f"Its mean rank is {rank:.2g} of {len(ranking.recipes)}{tail}.")
    rest = [name for name in dict.fromkeys(one.recipe for one in analysis.against_baseline) if name != best]
    for verdict, words in (("better", "also better"), ("worse", "worse")):
        names = [name for name in rest if any(one.verdict == verdict for one in _of(analysis, name))]
        if names:
            said.append(f"In at least one place {_list(names)} {'is' if len(names) == 1 else 'are'} {words}.")
    nothing = [name for name in rest if all(one.verdict == "undecided" for one in _of(analysis, name))]
    if nothing:
        said.append(f"Nothing can be said about {_list(nothing)}.")
    return said


def _scope(analysis: Analysis) -> list[str]:
    compared = analysis.against_baseline or analysis.against_original
    said = []
    if compared:
        documents, seeds = {one.documents for one in compared}, {one.seeds for one in compared}
        said.append(f"Measured on {_range(documents, 'document')} with {_range(seeds, 'calibration seed')}.")
        if 1 in seeds:
            said.append("Where there is one seed, intervals say nothing about other calibrations.")
    refused = dict.fromkeys(cell.recipe for cell in analysis.cells if cell.refused)
    if refused:
        said.append(f"Refused at least once: {_list(list(refused))}.")
    if analysis.unmeasured:
        said.append(f"Not measured by this metric: {_list(analysis.unmeasured)}.")
    return said


def _of(analysis: Analysis, recipe: str) -> list[Comparison]:
    return [one for one in analysis.against_baseline if one.recipe == recipe]


def _place(one: Cell | Comparison) -> str:
    return f"{one.model} at keep {one.keep:g} ({one.calibration})"


def _where(found: Sequence[Comparison]) -> str:
    return f" ({_list([_place(one) for one in found])})" if found else ""


def _list(names: Sequence[str]) -> str:
    shown = list(names[:_NAMED])
    if len(names) > _NAMED:
        shown.append(f"{len(names) - _NAMED} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _range(numbers: set[int], what: str) -> str:
    low, high = min(numbers), max(numbers)
    return _count(low, what) if low == high else f"{low} to {_count(high, what)}"


def _percent(share: Interval) -> str:
    return f"{100 * share.estimate:.0f} % [{100 * share.low:.0f} %, {100 * share.high:.0f} %]"


def _p(p: float) -> str:
    return "below 0.001" if p < 0.001 else f"{p:.2g}"


def _written(found: Interval) -> str:
    """The estimate and its ends, to two digits of the interval's width."""
    width = found.high - found.low
    digits = max(0, 1 - math.floor(math.log10(width))) if width > 0 else 6
    shown = [f"{value:.{digits}f}".replace("-", "−") for value in (found.estimate, found.low, found.high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
