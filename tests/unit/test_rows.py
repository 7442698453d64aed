"""The file of a comparison's results."""

from pathlib import Path

import numpy as np
import pytest

from dernkit.compare.rows import LayerFacts, Row, read_rows, write_rows
from dernkit.errors import CheckpointError
from dernkit.observations import Observations

SIZES = {"parameters": 10, "bytes": 20, "expert_bytes": 8, "moved": 0.125}


def row(key: str, **changes: object) -> Row:
    seen = Observations(("a:0", "a:1", "b:0"), ("a", "a", "b"), np.array([1.0, 2.0, 0.1]), np.array([2.0, 4.0, 1.0]))
    layer = LayerFacts(1, 4, (0, 2), (0.5, 0.1, 0.3, 0.1), (0.9, 0.4, 0.5, 0.2), (0, 3), (), 0.25)
    fields: dict[str, object] = {"refused": "", "layers": (layer,), "observations": {"perplexity/bits": seen}}
    fields |= {"metrics": {"perplexity/bits": seen.mean()}, "details": {"recipe": {"plan": {"keep": 0.5}}}}
    return Row(key, "tiny", "dern", 0.5, "mixed", 0, **SIZES, **(fields | changes))  # type: ignore[arg-type]


def test_rows_come_back_as_they_were_and_their_file_is_the_same_bytes(tmp_path: Path) -> None:
    rows = [row("one"), row("two", layers=(), observations={}, metrics={}, refused="plan.keep: must be 2.")]
    write_rows(rows, tmp_path / "a.parquet")
    write_rows(rows, tmp_path / "b.parquet")
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    back = read_rows(tmp_path / "a.parquet")
    assert repr(back) == repr(rows)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_the_metric_is_the_mean_of_its_groups() -> None:
    seen = row("one").observations["perplexity/bits"]
    assert seen.by_group() == {"a": 0.5, "b": 0.1}
    assert seen.mean() == pytest.approx(0.3)


@pytest.mark.parametrize("content", [None, b"", b"something else"])
def test_another_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "results.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(CheckpointError, match="must hold the results of dernkit compare"):
        read_rows(file)
