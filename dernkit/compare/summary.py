"""A comparison in a few sentences."""

from __future__ import annotations

import math
from collections.abc import Sequence

from dernkit.compare.findings import Analysis, Comparison, Verdict
from dernkit.compare.statistics import Interval

_NAMED = 4
"""Names in a list, before it only says how many more there are."""


def summary(analysis: Analysis) -> str:
    """Who wins where, by how much, and where nothing can be said: ``sentence`` of the analysis."""
    by = f"By {analysis.metric} ({'higher' if analysis.higher_is_better else 'lower'} is better),"
    best = _best(analysis)
    if best is None:
        said = [f"{by} nothing can be said: no other recipe was measured where {analysis.baseline} was."]
    else:
        said = [f"{by} {_headline(analysis, best)}", *_rank(analysis, best), *_others(analysis, best)]
    return " ".join([*said, *_scope(analysis)])


def _best(analysis: Analysis) -> str | None:
    """The recipe that is better than the baseline in most places, then worse in fewest, then best on the mean."""
    sign = -1.0 if analysis.higher_is_better else 1.0

    def order(recipe: str) -> tuple[int, int, float]:
        found = _of(analysis, recipe)
        mean = sign * sum(one.difference.estimate for one in found) / len(found)
        return -len(_with(found, "better")), len(_with(found, "worse")), mean

    return min(dict.fromkeys(one.recipe for one in analysis.against_baseline), key=order, default=None)


def _headline(analysis: Analysis, recipe: str) -> str:
    found, baseline = _of(analysis, recipe), analysis.baseline
    better, worse, undecided = (_with(found, verdict) for verdict in ("better", "worse", "undecided"))
    if better:
        where = f" in {len(better)} of {len(found)} places" if len(found) > 1 else ""
        text = f"{recipe} does best: better than {baseline}{where}, by {_spread(better)}{_taken_back(better)}"
    else:
        text = f"no recipe is shown to be better than {baseline}; {recipe} comes nearest, off by {_spread(found)}"
    for words, some in (("worse", worse), ("undecided", undecided)):
        text += f"; {words} in {_list([_place(one) for one in some])}" if some else ""
    return f"{text}."


def _spread(found: Sequence[Comparison]) -> str:
    """The smallest and the largest difference."""
    ordered = sorted(found, key=lambda one: abs(one.difference.estimate))
    ends = ordered if len(ordered) == 1 else [ordered[0], ordered[-1]]
    return " to ".join(f"{_written(one.difference)} ({_place(one)})" for one in ends)


def _taken_back(found: Sequence[Comparison]) -> str:
    shares = sorted((one.recovered for one in found if one.recovered), key=lambda share: share.estimate)
    if not shares:
        return ""
    ends = shares if len(shares) == 1 else [shares[0], shares[-1]]
    return f", which takes back {' to '.join(map(_percent, ends))} of its damage"


def _rank(analysis: Analysis, recipe: str) -> list[str]:
    ranking = analysis.ranking
    if ranking is None or recipe not in ranking.recipes:
        return []
    alike = {name for clique in ranking.cliques if recipe in clique for name in clique} | {recipe}
    rank, count = ranking.mean_ranks[ranking.recipes.index(recipe)], len(ranking.recipes)
    return [
        f"Its mean rank is {rank:.2g} of {count}; ranks alone tell it apart from {count - len(alike)} of the others."
    ]


def _others(analysis: Analysis, best: str) -> list[str]:
    rest = [name for name in dict.fromkeys(one.recipe for one in analysis.against_baseline) if name != best]
    lists = {
        "Also better somewhere": [name for name in rest if _with(_of(analysis, name), "better")],
        "Worse somewhere": [name for name in rest if _with(_of(analysis, name), "worse")],
        f"Nowhere told apart from {analysis.baseline}": [
            name for name in rest if len(_with(_of(analysis, name), "undecided")) == len(_of(analysis, name))
        ],
    }
    return [f"{what}: {_list(names)}." for what, names in lists.items() if names]


def _scope(analysis: Analysis) -> list[str]:
    compared = analysis.against_baseline or analysis.against_original
    said = []
    if compared:
        documents, seeds = {one.documents for one in compared}, {one.seeds for one in compared}
        said.append(
            f"Measured on {_range(documents, 'document')} with {_range(seeds, 'calibration seed')}; 95 % intervals."
        )
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


def _with(found: Sequence[Comparison], verdict: Verdict) -> list[Comparison]:
    return [one for one in found if one.verdict == verdict]


def _place(one: Comparison) -> str:
    return f"{one.model} at keep {one.keep:g} ({one.calibration})"


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


def _written(found: Interval) -> str:
    """The estimate and its ends, to two digits of the interval's width."""
    width = found.high - found.low
    digits = max(0, 1 - math.floor(math.log10(width))) if width > 0 else 6
    shown = [
        f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")
        for value in (found.estimate, found.low, found.high)
    ]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"
