"""A comparison: what its cells hold, that they are what runs give, and that no way to get there changes a byte."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dernkit.api import Subject
from dernkit.compare import measure
from dernkit.compare.cells import Cell, tasks
from dernkit.compare.rows import ORIGINAL, Row, read_rows
from dernkit.errors import CheckpointError, RecipeError
from dernkit.gather import describe
from dernkit.kernel import calls
from dernkit.models.loading import load_checked
from dernkit.models.source import open_source
from dernkit.models.universal import Universal
from dernkit.progress import Silent
from dernkit.registry import Registry
from dernkit.run import Run
from dernkit.stages.calibrate import load_stats
from dernkit.stages.evaluate import load_tokenizer
from tests.laws.moments import Moments, put_back
from tests.unit.comparing import TEXTS, Comparing
from tests.unit.workbench import edit_config, hashes

STABILITY = {"scorers": ["gate-mass", {"use": "reap"}], "shares": [0.25, 1.0]}


@pytest.fixture
def comparing(tmp_path: Path) -> Comparing:
    return Comparing(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, registry: Registry) -> Comparing:
    """A comparison that is done, sequential calibration, refused cells and stability included; it stays as it is."""
    made = Comparing(tmp_path_factory.mktemp("comparison"))
    recipes = {**made.data["recipes"], "sequential": "sequential.yaml"}
    made.write(keep=[0.5, 1], recipes=recipes, stability=STABILITY)
    made.compare(registry, checkpoints=True)
    return made


def rows(finished: Comparing) -> list[Row]:
    return read_rows(finished.out / "results.parquet")


def test_every_cell_has_a_row_in_the_order_of_the_bench(finished: Comparing) -> None:
    expected = []
    for model in ("mixtral", "qwen"):
        expected.append((model, "", 1.0, ORIGINAL, 0))
        for keep in (0.5, 0.125):
            for recipe in ("prune", "dern", "sequential"):
                expected += [(model, "mixed", keep, recipe, seed) for seed in (0, 1)]
    found = [(row.model, row.calibration, row.keep, row.recipe, row.seed) for row in rows(finished)]
    assert found == expected


def test_what_is_refused_is_a_row_that_says_why(finished: Comparing) -> None:
    for row in rows(finished):
        assert bool(row.refused) == (row.keep == 0.125)
        if row.refused:
            assert "keep" in row.refused and not row.observations and not row.layers


def test_a_measured_cell_has_facts_and_documents(finished: Comparing) -> None:
    names = {"perplexity/bits_per_byte", "perplexity/loss", "fidelity/kl", "fidelity/top1"}
    for row in rows(finished):
        if row.refused:
            continue
        assert set(row.observations) == names
        seen = row.observations["perplexity/bits_per_byte"]
        assert sorted(set(seen.groups)) == ["one", "two"]
        assert row.metrics["perplexity/bits_per_byte"] == seen.mean()
        assert row.metrics["perplexity/bits_per_byte/one"] == seen.by_group()["one"]
        assert (row.metrics["fidelity/kl"] == 0) == (row.recipe == ORIGINAL)
        for layer in row.layers:
            assert len(layer.kept) == 4 and len(layer.scores) == 8
            assert sum(layer.used) == pytest.approx(2)
            assert layer.error is not None and layer.error > 0
            assert (row.moved > 0) == (row.recipe == "dern") == bool(layer.affinity)
            assert sum(layer.moved) > 0 or row.recipe != "dern"


def test_originals_say_how_alike_their_experts_are(finished: Comparing) -> None:
    row = rows(finished)[0]
    similarity, cosines = row.details["similarity"], row.details["cosines"]
    assert list(similarity) == ["0", "1"]
    for layer, matrix in similarity.items():
        assert torch.tensor(matrix).shape == (8, 8)
        assert torch.tensor(matrix).diagonal().tolist() == pytest.approx([1.0] * 8)
        assert max(max(line) for line in matrix) == pytest.approx(1.0)
        assert sum(cosines["counts"][layer]) == 8 * 24
    assert len(cosines["edges"]) == len(cosines["counts"]["0"]) + 1


def test_details_say_how_a_cell_is_made_again_and_name_no_place_of_this_machine(finished: Comparing) -> None:
    row = next(row for row in rows(finished) if row.recipe == "dern" and row.seed == 1)
    recipe = row.details["recipe"]
    assert recipe["seed"] == 1 and recipe["plan"]["keep"] == 0.5
    assert recipe["calibrate"]["source"]["path"] == "calib.txt" and len(recipe["calibrate"]["source"]["files"]) == 64
    assert row.details["model"]["path"] == "mixtral" and len(row.details["model"]["fingerprint"]) == 64
    assert row.details["evaluate"][0]["path"] == "heldout"
    assert set(row.details["versions"]) >= {"dernkit", "torch", "transformers"}
    assert str(finished.root) not in repr(row)


def test_a_cell_is_what_a_run_of_its_recipe_gives(finished: Comparing, registry: Registry, tmp_path: Path) -> None:
    """From disk to disk, evaluated in float32: the same bits, sizes and documents."""
    bench = finished.bench(registry)
    cells = [task for task in tasks(bench, registry, trust_remote_code=False) if isinstance(task, Cell)]
    found = {row.key: row for row in rows(finished)}
    chosen = [cell for cell in cells if cell.recipe and cell.keep == 0.5 and cell.context.seed == 1]
    assert len(chosen) == 6
    for number, cell in enumerate(chosen):
        out, path = tmp_path / str(number), cell.context.subject.path
        assert cell.recipe is not None
        Run(replace(cell.recipe, evaluators=()), path.name, path, out, registry, Silent()).execute()
        row = found[cell.key]
        about = describe(open_source(out / "model", [Universal()]))
        assert (row.parameters, row.bytes, row.expert_bytes) == tuple(
            about[name] for name in ("parameters", "bytes", "expert_bytes")
        )
        subject = _subject(out / "model", lambda path=path: _subject(path))
        for evaluator in cell.context.subject.evaluators:
            for metric, seen in calls.observe(evaluator, subject).items():  # type: ignore[arg-type]
                assert repr(seen) == repr(row.observations[f"{evaluator.name}/{metric}"]), cell.name


def _subject(path: Path, original: Any = None) -> Subject:
    model: Any = load_checked(path, [Universal()])
    return Subject(model.float(), load_tokenizer(path), path, original)


def test_checkpoints_of_cells_are_those_of_runs(finished: Comparing, registry: Registry, tmp_path: Path) -> None:
    folders = sorted(finished.out.glob("checkpoints/*"))
    assert len(folders) == 12  # what was refused has none
    for name in ("mixtral-mixed-keep-0.5-dern-seed-1", "qwen-mixed-keep-0.5-sequential-seed-0"):
        folder = next(folder for folder in folders if folder.name.startswith(name))
        cell = next(
            task
            for task in tasks(finished.bench(registry), registry, trust_remote_code=False)
            if isinstance(task, Cell) and folder.name.endswith(task.key[:8])
        )
        assert cell.recipe is not None
        path, out = cell.context.subject.path, tmp_path / name
        Run(replace(cell.recipe, evaluators=()), str(path), path, out, registry, Silent()).execute()
        assert hashes(folder / "model")["model.safetensors"] == hashes(out / "model")["model.safetensors"]


def test_cached_statistics_serve_a_run(finished: Comparing) -> None:
    files = sorted(finished.out.glob("statistics/*.safetensors"))
    assert len(files) == 4
    for file in files:
        assert set(load_stats(file)[1].values) >= {"routed", "gate_sum", "sample"}


def test_a_finished_comparison_computes_nothing_again(
    finished: Comparing, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = hashes(finished.out)
    monkeypatch.setattr(measure.Laboratory, "_load", lambda *_: pytest.fail("a model is loaded"))
    finished.compare(registry)
    assert hashes(finished.out) == before


def test_only_new_cells_are_measured(comparing: Comparing, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []
    real = measure.Laboratory.measure

    def noted(self: measure.Laboratory, cell: Cell) -> Row:
        measured.append(cell.label)
        return real(self, cell)

    monkeypatch.setattr(measure.Laboratory, "measure", noted)
    del comparing.data["models"]["qwen"]
    comparing.write()
    comparing.compare(registry)
    assert measured == [ORIGINAL, "prune", "dern", "prune", "dern"]
    measured.clear()
    comparing.write(
        recipes={**comparing.data["recipes"], "reap": {"file": "prune.yaml", "set": {"plan.score.use": "reap"}}}
    )
    comparing.compare(registry)
    assert measured == ["reap", "reap"]
    measured.clear()
    (comparing.root / "heldout" / "one.txt").write_text("w1 w2 w3 w4 " * 20)
    comparing.write()
    comparing.compare(registry)
    assert len(measured) == 5


def test_a_kill_at_any_moment_changes_no_byte_of_the_results(
    comparing: Comparing, registry: Registry, tmp_path: Path
) -> None:
    del comparing.data["models"]["qwen"]
    comparing.write(stability={**STABILITY, "scorers": ["gate-mass"]}, seeds=[0])
    moments = Moments(comparing.out)
    with moments.watched():
        comparing.compare(registry)
    expected = comparing.results()
    assert len(expected) == 2 and len(moments.states) > 15
    for number, state in enumerate(moments.states[::3]):
        comparing.out = put_back(state, tmp_path / str(number) / "out")
        comparing.compare(registry)
        assert comparing.results() == expected, sorted(state)


def test_more_processes_change_no_byte_of_the_results(comparing: Comparing, registry: Registry) -> None:
    comparing.write(stability=STABILITY)
    comparing.compare(registry)
    expected, comparing.out = comparing.results(), comparing.root / "parallel"
    comparing.compare(registry, jobs=2)
    assert comparing.results() == expected


def test_results_that_were_kept_without_their_cells_are_made_again(comparing: Comparing, registry: Registry) -> None:
    comparing.compare(registry)
    expected = comparing.results()
    for path in comparing.out.iterdir():
        if path.name != "results.parquet":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    comparing.compare(registry)
    assert comparing.results() == expected


def test_another_directory_is_refused(comparing: Comparing, registry: Registry) -> None:
    comparing.out = comparing.root
    with pytest.raises(CheckpointError, match="must be empty, new, or an earlier comparison"):
        comparing.compare(registry)


def test_a_metric_that_nothing_observes_is_refused_when_the_first_original_is_measured(
    comparing: Comparing, registry: Registry
) -> None:
    comparing.write(metric="perplexity/bits")
    for _ in range(2):
        with pytest.raises(
            RecipeError, match=r"Got 'perplexity/bits' instead\. mixtral has fidelity/kl, .*, perplexity"
        ):
            comparing.compare(registry)
    assert len(list(comparing.out.glob("cells/*"))) == 1


def test_files_that_are_not_there_are_named_before_anything_is_done(comparing: Comparing, registry: Registry) -> None:
    comparing.write(evaluate=[{**TEXTS, "path": "nowhere"}])
    with pytest.raises(RecipeError, match=r"evaluate, model 'mixtral': .*nowhere must exist"):
        comparing.compare(registry)
    assert not comparing.out.exists()


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_cannot_be_measured_is_named(comparing: Comparing, registry: Registry, jobs: int) -> None:
    edit_config(comparing.root / "qwen", eos_token_id="nonsense", attention_dropout="high")
    with pytest.raises(CheckpointError, match="qwen"):
        comparing.compare(registry, jobs=jobs)
