"""What it takes to make a comparison again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from dernkit.compare.report.inputs import RESULTS, Results
from dernkit.compare.report.tables import Entry, Table
from dernkit.compare.rows import ORIGINAL, Row

COMMAND = "dernkit compare BENCH.yaml --out DIR"


@dataclass(frozen=True, slots=True)
class Listing:
    """A text that is shown when it is asked for."""

    title: str
    text: str


def models(results: Results) -> Table:
    """The models with their fingerprints."""
    lines = []
    for name in results.models:
        original = results.original(name)
        if original is None:
            continue
        facts = original.details.get("model", {})
        seen = original.observations.get(results.analysis.metric)
        documents = f"{len(seen.documents):,} in {len(set(seen.groups))}" if seen else "–"
        weight = f"{seen.weights.sum():,.0f}" if seen else "–"
        shape = f"{facts.get('experts', '–')}, top {facts.get('top_k', '–')}"
        sizes = (f"{original.parameters:,}", f"{original.bytes / 1e6:,.1f} MB", documents, weight)
        lines.append(
            tuple(
                map(Entry, (name, str(facts.get("family", "–")), shape, *sizes, _digest(facts.get("fingerprint", "–"))))
            )
        )
    header = ("model", "family", "experts", "parameters", "size", "documents in domains", "weight", "fingerprint")
    note = "Weight: what the metric is divided by, summed over the documents (bytes for bits per byte)."
    return Table("Models", header, tuple(lines), note, words=2)


def made_from(results: Results) -> Table:
    """Seeds, calibration tokens and versions."""
    rows = [row for row in results.rows if row.recipe != ORIGINAL]
    seeds = ", ".join(str(seed) for seed in sorted({row.seed for row in rows}))
    lines = [("command", COMMAND), ("cells", f"{len(results.rows):,}, in {RESULTS}"), ("calibration seeds", seeds)]
    lines += [(f"calibration {name}", text) for name, text in _calibrations(rows).items()]
    lines += [("evaluators", text) for text in dict.fromkeys(_evaluators(results.rows))]
    lines.append(("versions", ", ".join(f"{name} {version}" for name, version in _versions(results.rows).items())))
    header = ("what", "value")
    return Table("Made from", header, tuple((Entry(name), Entry(text)) for name, text in lines), words=2)


def _calibrations(rows: Iterable[Row]) -> dict[str, str]:
    found: dict[str, str] = {}
    for row in rows:
        spec = row.details.get("recipe", {}).get("calibrate")
        if spec and row.calibration not in found:
            count, length = spec.get("sequences"), spec.get("length")
            tokens = f"{count:,} × {length:,} = {count * length:,} tokens of " if count and length else ""
            found[row.calibration] = tokens + _inline(spec.get("source"))
    return found


def _evaluators(rows: Iterable[Row]) -> Iterable[str]:
    for row in rows:
        if row.recipe == ORIGINAL:
            yield "; ".join(map(_inline, row.details.get("evaluate", [])))


def _versions(rows: Iterable[Row]) -> dict[str, str]:
    """Of all rows; where they differ, all of them."""
    found: dict[str, list[str]] = {}
    for row in rows:
        for name, version in row.details.get("versions", {}).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: " and ".join(found[name]) for name in sorted(found)}


def _inline(component: Mapping[str, Any] | None) -> str:
    """``perplexity (path: heldout, length: 256)``."""
    if not component:
        return "–"
    given = {name: value for name, value in component.items() if name != "use" and value is not None}
    options = ", ".join(f"{name}: {_plain(name, value)}" for name, value in given.items())
    return f"{component.get('use', '–')}{f' ({options})' if options else ''}"


def _plain(name: str, value: Any) -> str:
    if name == "files":
        return _digest(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _digest(value: Any) -> str:
    """Enough of it to tell two apart; the results have it whole."""
    return str(value)[:16]


def recipes(results: Results) -> list[Listing]:
    """Each recipe in full, as it was for the first of its cells."""
    found = []
    for name in results.recipes:
        row = next(row for row in results.rows if row.recipe == name)
        text = yaml.safe_dump(row.details.get("recipe", {}), sort_keys=False, width=100, allow_unicode=True)
        found.append(Listing(f"{name} (here on {row.model}, keep {row.keep:.3g}, seed {row.seed})", text))
    return found
