"""What recombination in function space reaches: the tables of docs/explanation/recombination.md from the results.

    python -m benchmarks.recombination [--write-docs]

Reads the results of the comparisons in TABLES, as far as they are there (`make bench-recombination` makes them), and
prints their tables; with --write-docs it puts them into the page.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from benchmarks.tables import BASELINE, METRIC, RESULTS, ROOT, dropped, interval, markdown, pairs, write_page
from dernkit.compare.analysis import compare_pair
from dernkit.compare.rows import ORIGINAL, Row, read_rows

PAGE = ROOT / "docs" / "explanation" / "recombination.md"
LOSS = "perplexity/loss"
ACCURACY = "lm-eval/acc"
Table = tuple[list[str], list[list[str]]]


def models(rows: Sequence[Row]) -> list[str]:
    """In the order of the rows."""
    return list(dict.fromkeys(row.model for row in rows))


def mean(rows: Sequence[Row], metric: str, **where: object) -> float | None:
    """Over the seeds of the rows that are meant; None: there are none."""
    found = [
        row.metrics[metric]
        for row in rows
        if not row.refused and all(getattr(row, name) == value for name, value in where.items())
    ]
    return sum(found) / len(found) if found else None


def rise(rows: Sequence[Row], metric: str, **where: object) -> float | None:
    """Over the original."""
    found = mean(rows, metric, **where)
    original = mean(rows, metric, model=where["model"], recipe=ORIGINAL)
    return None if found is None or original is None else found - original


def shown(value: float | None, form: str = "+.3f") -> str:
    """A number, or a dash."""
    return "-" if value is None else f"{value:{form}}"


def reached(rows: Sequence[Row]) -> Table:
    """Rise of the loss, and the share of frequency pruning's that is taken back, a row a model and ratio."""
    table = []
    for each in pairs(rows, "recombine", BASELINE):
        where = {"model": each.model, "keep": each.keep, "calibration": each.calibration}
        losses = [shown(rise(rows, LOSS, recipe=recipe, **where)) for recipe in (BASELINE, "recombine")]
        table.append([each.model, dropped(each.keep), *losses, interval(each.recovered, ".0%")])
    return ["model", "experts", "frequency pruning (nats)", "recombine (nats)", "taken back (95%)"], table


def three_quarters(rows: Sequence[Row]) -> Table:
    """A quarter of the experts recombined against half of them by frequency: loss of the one less that of the other."""
    table = []
    for model in models(rows):
        both = [
            row
            for row in rows
            if row.model == model and (row.recipe, row.keep) in (("recombine", 0.25), (BASELINE, 0.5))
        ]
        both = [replace(row, keep=0.5) for row in both]
        both += [row for row in rows if row.model == model and row.recipe == ORIGINAL]
        for calibration in dict.fromkeys(row.calibration for row in both if row.recipe != ORIGINAL):
            found = compare_pair(
                both,
                model=model,
                keep=0.5,
                calibration=calibration,
                metric=METRIC,
                recipe="recombine",
                against=BASELINE,
            )
            table.append([model, interval(found.difference, "+.4f")])
    return ["model", "recombine at a quarter less frequency pruning at half (bits per byte, 95%)"], table


def variants(rows: Sequence[Row]) -> Table:
    """Share of frequency pruning's damage that each variant takes back, a column a model."""
    columns = models(rows)
    table = []
    for recipe in dict.fromkeys(row.recipe for row in rows if row.recipe not in (ORIGINAL, BASELINE)):
        shares = {each.model: each.recovered for each in pairs(rows, recipe, BASELINE)}
        table.append([recipe, *(interval(shares.get(model), ".0%") for model in columns)])
    return ["variant", *columns], table


def widths(rows: Sequence[Row]) -> Table:
    """Rise of the loss by share of experts and share of width, those that are as large side by side."""
    columns = models(rows)
    found = dict.fromkeys((row.keep, row.recipe) for row in rows if row.recipe != ORIGINAL)
    table = []
    for keep, recipe in found:
        width = 1.0 if recipe == BASELINE else float(recipe.removeprefix("width-"))
        if keep * width == 1:
            continue
        share = f"{keep:.0%}, by frequency alone" if recipe == BASELINE else f"{keep:.0%}"
        cells = [shown(rise(rows, LOSS, model=model, keep=keep, recipe=recipe)) for model in columns]
        table.append((-keep * width, [share, f"{width:.0%}", f"{keep * width:.0%}", *cells]))
    return ["experts", "width", "size of the experts", *columns], [row for _, row in sorted(table)]


def sizes(rows: Sequence[Row]) -> Table:
    """Rise of the loss by the number of sampled tokens."""
    table = []
    for calibration in dict.fromkeys(row.calibration for row in rows if row.recipe != ORIGINAL):
        where = {"model": rows[0].model, "calibration": calibration}
        table.append(
            [calibration, *(shown(rise(rows, LOSS, recipe=name, **where)) for name in (BASELINE, "recombine"))]
        )
    return ["sampled tokens", "frequency pruning (nats)", "recombine (nats)"], table


def texts(rows: Sequence[Row]) -> Table:
    """Rise of the mean loss over all domains by what was calibrated on."""
    columns = models(rows)
    table = []
    for calibration in dict.fromkeys(row.calibration for row in rows if row.recipe != ORIGINAL):
        for recipe in ("prune-same", "recombine"):
            where = {"calibration": calibration, "recipe": recipe}
            table.append([calibration, recipe, *(shown(rise(rows, LOSS, model=model, **where)) for model in columns)])
    return ["calibrated on", "recipe", *columns], table


def other_domains(rows: Sequence[Row]) -> Table:
    """Loss of recombination less that of pruning to the same experts, on each domain but the one of the calibration."""
    table = []
    for calibration in dict.fromkeys(row.calibration for row in rows if row.recipe != ORIGINAL):
        for model in models(rows):
            if differences := dict(_by_domain(rows, model, calibration)):
                worst = max(differences, key=lambda domain: differences[domain])
                there = calibration.removesuffix("+written")
                own = differences.get(there)
                others = [value for domain, value in differences.items() if domain != there]
                table.append(
                    [
                        calibration,
                        model,
                        shown(own),
                        shown(sum(others) / len(others)),
                        f"{worst} {differences[worst]:+.3f}",
                    ]
                )
    return ["calibrated on", "model", "there", "mean of the other domains", "worst domain"], table


def _by_domain(rows: Sequence[Row], model: str, calibration: str) -> Iterator[tuple[str, float]]:
    where = {"model": model, "calibration": calibration}
    for name in next(row.metrics for row in rows if not row.refused):
        if name.startswith(f"{LOSS}/"):
            values = [mean(rows, name, recipe=recipe, **where) for recipe in ("recombine", "prune-same")]
            if values[0] is not None and values[1] is not None:
                yield name.removeprefix(f"{LOSS}/"), values[0] - values[1]


def tasks(rows: Sequence[Row]) -> Table:
    """By three measures: accuracy on lm-eval's tasks, with recombination's less each other's, paired by document; loss;
    and how many tokens of greedy continuations are the original's."""
    table = []
    for row in rows:
        difference = "-"
        if row.recipe not in (ORIGINAL, "recombine"):
            found = compare_pair(
                rows,
                model=row.model,
                keep=row.keep,
                calibration=row.calibration,
                metric=ACCURACY,
                recipe="recombine",
                against=row.recipe,
            )
            difference = interval(found.difference, "+.3f")
        written = "-" if row.recipe == ORIGINAL else f"{row.metrics['generation/agreement']:.0%}"
        table.append([row.recipe, f"{row.metrics[ACCURACY]:.3f}", difference, f"{row.metrics[LOSS]:.3f}", written])
    return ["recipe", "accuracy", "recombine less it (95%)", "loss on text (nats)", "continuations as before"], table


TABLES: dict[str, dict[str, Callable[[Sequence[Row]], Table]]] = {
    "recombination": {"reached": reached, "three-quarters": three_quarters},
    "variants": {"variants": variants},
    "width": {"widths": widths},
    "sample-size": {"sizes": sizes},
    "calibration-text": {"texts": texts, "domains": other_domains},
    "smol-recombination": {"tasks": tasks},
}
"""Comparison -> place in the page -> what goes there."""


def main() -> None:
    """Print the tables, or write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write-docs", action="store_true", help="put the tables into the page")
    arguments = parser.parse_args()
    found: dict[str, Table] = {}
    for comparison, places in TABLES.items():
        file = RESULTS / comparison / "results.parquet"
        if file.exists():
            found |= {place: table(read_rows(file)) for place, table in places.items()}
    tables = {name: markdown(*table) for name, table in found.items()}
    if arguments.write_docs:
        write_page(PAGE, tables)
    else:
        print("\n\n".join(tables.values()))


if __name__ == "__main__":
    main()
