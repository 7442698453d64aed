"""The curve from layer error to loss: planted laws are found again, and what says nothing is not fitted."""

from __future__ import annotations

import importlib.util
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dernkit.compare.rows import ORIGINAL, LayerFacts, Row, write_rows
from dernkit.observations import Observations
from dernkit.profiling.curve import Cell, Curves, as_json, fit, load_curves

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "fit_profile.py"


def planted(models: dict[str, float], *, power: float = 1.5, noise: float = 0.0, cells: int = 20) -> list[Cell]:
    """rise = (the model's own factor) · error^power · exp(noise · N(0, 1))."""
    dice = random.Random(0)
    return [
        Cell(model, error := 10 ** dice.uniform(-2, -0.1), factor * error**power * math.exp(noise * dice.gauss(0, 1)))
        for model, factor in models.items()
        for _ in range(cells)
    ]


def test_a_power_law_is_found_exactly() -> None:
    curve = fit(planted({"a": 0.7, "b": 0.7}))
    assert curve is not None
    assert (curve.scale, curve.power) == pytest.approx((0.7, 1.5))
    assert (curve.typical, curve.factor) == pytest.approx((1, 1))
    assert curve.spearman == pytest.approx({"a": 1, "b": 1})
    assert curve.rise(0.25) == pytest.approx(0.7 * 0.125) and curve.rise(0) == 0
    assert (curve.cells, curve.left_out) == (40, 0)


def test_how_far_it_is_off_is_taken_on_models_that_it_was_not_fitted_on() -> None:
    curve = fit(planted({"a": 1.0, "b": 4.0}))
    assert curve is not None
    assert 1 < curve.rise(0.1) / 0.1**1.5 < 4  # between the two
    assert (curve.typical, curve.factor) == pytest.approx((4, 4))  # each by the line of the other one


def test_noise_widens_the_range_as_a_normal_distribution_does() -> None:
    curve = fit(planted({"a": 1.0, "b": 1.0, "c": 1.0}, noise=0.5, cells=400))
    assert curve is not None
    assert curve.power == pytest.approx(1.5, abs=0.05)
    assert math.log(curve.typical) == pytest.approx(0.5 * 0.674, rel=0.1)
    assert math.log(curve.factor) == pytest.approx(0.5 * 1.645, rel=0.1)
    assert all(0.9 < value < 1 for value in curve.spearman.values())


def test_cells_that_did_not_rise_are_left_out_and_counted() -> None:
    curve = fit([*planted({"a": 0.7, "b": 0.7}), Cell("a", 0.1, -0.01), Cell("b", 0.0, 0.0)])
    assert curve is not None
    assert (curve.cells, curve.left_out) == (40, 2)
    assert curve.scale == pytest.approx(0.7)
    assert curve.spearman["a"] < 1


@pytest.mark.parametrize(
    "cells",
    [
        planted({"a": 0.7}, cells=40),
        planted({"a": 0.7, "b": 0.7}, cells=5),
        planted({"a": 0.7, "b": 0.7}, power=-1),
        [Cell(model, 0.1, rise / 10) for model in "ab" for rise in range(1, 11)],
        [],
    ],
    ids=["one model", "few cells", "falling", "all errors the same", "none"],
)
def test_nothing_is_fitted_to_what_says_nothing(cells: list[Cell]) -> None:
    assert fit(cells) is None


def test_curves_come_back_from_their_file(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    assert load_curves(file) is None
    curve = fit(planted({"a": 1.0, "b": 1.3}, noise=0.2))
    assert curve is not None
    file.write_text(as_json(Curves({"nats per token": curve}, ("a", "b"), "0123abc")))
    back = load_curves(file)
    assert back is not None and (back.models, back.commit) == (("a", "b"), "0123abc")
    found = back.by_unit["nats per token"]
    assert (found.scale, found.power, found.factor) == pytest.approx((curve.scale, curve.power, curve.factor), rel=1e-5)
    file.write_text(as_json(Curves({}, (), "0123abc")))
    assert load_curves(file) is None


def row(model: str, recipe: str, loss: float, errors: list[float | None], **changes: Any) -> Row:
    """Two domains; one with ``loss``, one with twice that."""
    values, weights = np.array([loss * 3, loss * 2 * 5]), np.array([3.0, 5.0])
    seen = Observations(("x:0", "y:0"), ("x", "y"), values, weights)
    layers = tuple(LayerFacts(i, 4, (0, 1), (), (), (0, 0), (), error) for i, error in enumerate(errors))
    fields: dict[str, Any] = {"refused": "", "parameters": 1, "bytes": 1, "expert_bytes": 1, "moved": 0.0}
    fields |= {"layers": layers, "observations": {"perplexity/loss": seen}}
    fields |= {"details": {} if recipe == ORIGINAL else {"recipe": {"calibrate": {"sequential": False}}}}
    return Row(f"{model}{recipe}{errors}", model, recipe, 0.5, "mixed", 0, **(fields | changes))


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("fit_profile", PROGRAM)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(module, "FILE", tmp_path / "data" / "profile.json")
    return module


def test_the_program_makes_the_file_from_a_comparison(program: Any, tmp_path: Path, capsys: Any) -> None:
    rows = [row(model, ORIGINAL, 2.0, []) for model in "ab"]
    for number, cell in enumerate(planted({"a": 0.7, "b": 0.7}, cells=10)):
        # the metric is the mean of both domains, 1.5 times the first one's
        rows.append(row(cell.model, f"r{number}", 2.0 + cell.rise / 1.5, [0.5 * cell.error, None, 1.5 * cell.error]))
    rows.append(row("a", "refused", 9.0, [], refused="no", observations={}, layers=()))
    rows.append(row("a", "unrouted", 9.0, [None]))
    rows.append(row("a", "sequential", 9.0, [0.01], details={"recipe": {"calibrate": {"sequential": True}}}))
    (tmp_path / "results" / "full").mkdir(parents=True)
    write_rows(rows, tmp_path / "results" / "full" / "results.parquet")
    curves, points = program.fitted(sorted(program.RESULTS.glob("*/results.parquet")), "0123abc")
    assert {unit: len(cells) for unit, cells in points.items()} == {"nats per token": 20, "bits per byte": 0}
    assert curves.models == ("a", "b") and list(curves.by_unit) == ["nats per token"]
    curve = curves.by_unit["nats per token"]
    assert (curve.scale, curve.power) == pytest.approx((0.7, 1.5), rel=1e-6)
    program.FILE.parent.mkdir()
    program.FILE.write_text(as_json(curves))
    assert json.loads(program.FILE.read_text())["by_unit"]["nats per token"]["cells"] == 20


def test_the_program_says_what_is_lacking(program: Any) -> None:
    with pytest.raises(SystemExit, match="no curve: must have 12 cells of 2 models"):
        program.main()
    assert not program.FILE.exists()
