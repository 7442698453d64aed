"""The results of a comparison: one row a cell, in one Parquet file that holds all that is needed to make it again."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dernkit.errors import CheckpointError, RecipeError
from dernkit.observations import Observations
from dernkit.sentences import reason

ORIGINAL = "original"
"""Recipe of the rows of models as they are."""
_FORMAT = b"dernkit comparison 1"


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """What happened to one MoE layer."""

    layer: int
    experts: int
    kept: tuple[int, ...]
    scores: tuple[float, ...]
    """Of all experts; empty in rows of originals."""
    used: tuple[float, ...]
    """Share of the calibration tokens that each expert of the original gets, sum = top-k; empty if not counted."""
    moved: tuple[int, ...]
    """Segments that arrived at each kept expert."""
    affinity: tuple[float, ...]
    """Deciles (11 values, 0 % to 100 %) of the affinities of what moved; empty if nothing did."""
    error: float | None
    """‖new output − old‖² / ‖old‖² of the routed experts on sampled inputs; None without a sample."""


@dataclass(frozen=True, slots=True)
class Row:
    """One cell: a model after a recipe, measured. ``ORIGINAL`` rows have keep 1, no calibration and seed 0."""

    key: str
    """Digest of all that it is made from."""
    model: str
    recipe: str
    keep: float
    """Share of the experts that stay."""
    calibration: str
    seed: int
    refused: str
    """The sentence with which dernkit refused; empty where it did not. Then there is nothing measured."""
    parameters: int
    bytes: int
    expert_bytes: int
    moved: float
    """Moved segments per segment of a dropped expert."""
    layers: tuple[LayerFacts, ...] = ()
    observations: Mapping[str, Observations] = field(default_factory=dict)
    """``evaluator/metric`` -> what was measured on each document."""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """All numbers of evaluators, those of `observations` included (mean, and ``…/group``)."""
    details: Mapping[str, Any] = field(default_factory=dict)
    """JSON: resolved recipe, calibration, fingerprint of the model, versions, evaluators."""


def write_rows(rows: Iterable[Row], file: Path) -> None:
    """All rows as Parquet, renamed when complete; the same rows give the same bytes."""
    pa, parquet = _arrow()
    table = pa.Table.from_pylist([_flat(row) for row in rows]).replace_schema_metadata({b"format": _FORMAT})
    partial = file.with_name(file.name + ".partial")
    parquet.write_table(table, partial, compression="zstd")
    partial.replace(file)


def read_rows(file: Path) -> list[Row]:
    """What `write_rows` wrote.

    Raises:
        CheckpointError: it is something else.
    """
    pa, parquet = _arrow()
    try:
        table = parquet.read_table(file)
        if (table.schema.metadata or {}).get(b"format") != _FORMAT:
            raise ValueError("another format")
        return [_row(item) for item in table.to_pylist()]
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise CheckpointError(
            f"{file}: must hold the results of dernkit compare. Got '{reason(error)}' instead. "
            f"Run the comparison again."
        ) from None


def _arrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise RecipeError(
            "compare: results need the package pyarrow. Got an environment without it instead. "
            "Run pip install 'dernkit[compare]'."
        ) from None
    return pyarrow, pyarrow.parquet


def _flat(row: Row) -> dict[str, Any]:
    observed = [
        {
            "metric": name,
            "higher_is_better": seen.higher_is_better,
            "documents": list(seen.documents),
            "groups": list(seen.groups),
            "values": seen.values.tolist(),
            "weights": seen.weights.tolist(),
        }
        for name, seen in sorted(row.observations.items())
    ]
    plain = {name: getattr(row, name) for name in _PLAIN}
    return plain | {
        "layers": json.dumps([asdict(layer) for layer in row.layers]),
        "observations": observed,
        "metrics": json.dumps(dict(row.metrics), sort_keys=True),
        "details": json.dumps(row.details, sort_keys=True),
    }


_PLAIN: Sequence[str] = (
    *("key", "model", "recipe", "keep", "calibration", "seed", "refused"),
    *("parameters", "bytes", "expert_bytes", "moved"),
)


def _row(item: Mapping[str, Any]) -> Row:
    observed = {
        seen["metric"]: Observations(
            documents=tuple(seen["documents"]),
            groups=tuple(seen["groups"]),
            values=np.asarray(seen["values"], dtype=np.float64),
            weights=np.asarray(seen["weights"], dtype=np.float64),
            higher_is_better=seen["higher_is_better"],
        )
        for seen in item["observations"]
    }
    layers = []
    for layer in json.loads(item["layers"]):
        facts: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in layer.items()}
        layers.append(LayerFacts(**facts))
    return Row(
        **{name: item[name] for name in _PLAIN},
        layers=tuple(layers),
        observations=observed,
        metrics=json.loads(item["metrics"]),
        details=json.loads(item["details"]),
    )
