"""Killed at any moment, the same command goes on where it was and ends with the same bytes; nothing half-made shows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dernkit.kernel.compress import compress_layer
from dernkit.stages import apply
from tests.laws.moments import Moments, State, put_back
from tests.unit.workbench import DERN, Workbench, hashes, results, stages

JOURNAL = ".partial/model/.journal.json"


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Workbench:
    """A DERN recipe on a checkpoint of two shards."""
    bench = Workbench(tmp_path_factory.mktemp("resume"), shard="150KB")
    bench.write(**DERN)
    return bench


@pytest.fixture(scope="module")
def moments(bench: Workbench) -> Moments:
    """All moments of an undisturbed run."""
    moments = Moments(bench.out)
    with moments.watched():
        bench.finish()
    return moments


def artifacts(out: Path) -> dict[str, str]:
    """All artifacts but the report, which holds times."""
    return {name: value for name, value in results(out).items() if name != "report.md"}


def model_of(state: State, folder: str = "model/") -> State:
    return {name.removeprefix(folder): content for name, content in state.items() if name.startswith(folder)}


def telling(states: list[State]) -> list[State]:
    """Without most of those that differ in nothing but how far a shard is written: one in 20 of these stays."""
    kept, before = [], None
    for number, state in enumerate(states):
        apart = {name: content for name, content in state.items() if not name.endswith(".safetensors")}
        if apart != before or number % 20 == 0:
            kept.append(state)
        before = apart
    return kept


@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_kill_at_any_moment_changes_no_byte_of_the_result(
    bench: Workbench, moments: Moments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    expected = artifacts(moments.out)
    states = telling(moments.states)[::every]
    assert len(states) >= 10
    for number, state in enumerate(states):
        monkeypatch.setattr(bench, "out", put_back(state, tmp_path / str(number) / "out"))
        bench.finish()
        assert artifacts(bench.out) == expected, sorted(state)


def test_no_moment_shows_an_unfinished_model(moments: Moments) -> None:
    shown = [model for state in moments.states if (model := model_of(state))]
    assert shown and len(shown) < len(moments.states)
    assert all(model == model_of(moments.states[-1]) for model in shown)


def test_no_moment_loses_an_earlier_model(tmp_path: Path) -> None:
    """Between two renames the earlier one is not in its place: then the next command puts it back first."""
    bench = Workbench(tmp_path)
    bench.finish("plan.keep=6")
    moments = Moments(bench.out)
    moments.take()
    with moments.watched():
        bench.finish()
    old, new = model_of(moments.states[0]), model_of(moments.states[-1])
    away = []
    for state in moments.states:
        if not model_of(state):
            assert model_of(state, ".partial/model.old/") == old
            assert model_of(state, ".partial/model/") == new
            away.append(state)
        else:
            assert model_of(state) in (old, new)
    assert len(away) == 1
    bench.out = put_back(away[0], tmp_path / "away" / "out")
    (tmp_path / "away/out/plan.json").write_text("{")
    assert bench.run().exit_code == 5
    assert {file.name: file.read_bytes() for file in (bench.out / "model").iterdir()} == old


KILLED = """
import os, signal
from dernkit.cli import main
from dernkit.stages import apply

compress_layer = apply.compress_layer

def compress_only_layer_0(bank, plan, *arguments):
    if plan.layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return compress_layer(bank, plan, *arguments)

apply.compress_layer = compress_only_layer_0
main(prog_name="dernkit")
"""


def test_a_process_that_is_killed_is_gone_on_with(
    bench: Workbench, moments: Moments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = artifacts(moments.out)
    monkeypatch.setattr(bench, "out", tmp_path / "out")
    arguments = ["run", str(bench.recipe), "--model", str(bench.model), "--out", str(bench.out)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *arguments], env=one_thread, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    assert not (bench.out / "model").exists()
    assert stages(bench.run()) == ["apply"]
    assert artifacts(bench.out) == expected


def test_layers_that_are_done_are_not_done_again(bench: Workbench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[int] = []

    def stop_at_second(bank, plan, *arguments):  # type: ignore[no-untyped-def]
        if done == [0] and not (tmp_path / "resumed").exists():
            raise KeyboardInterrupt
        done.append(plan.layer)
        return compress_layer(bank, plan, *arguments)

    monkeypatch.setattr(apply, "compress_layer", stop_at_second)
    monkeypatch.setattr(bench, "out", tmp_path / "out")
    assert bench.run().exit_code == 130
    assert json.loads((bench.out / JOURNAL).read_text())["done"] == [0]
    (tmp_path / "resumed").touch()
    assert stages(bench.run()) == ["apply"]
    assert done == [0, 1]


def test_shards_that_are_gone_are_all_made_again(
    bench: Workbench, moments: Moments, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A journal is about files: without them it says nothing, not even after a second kill."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    state = next(state for state in moments.states if b'"done": [0, 1]' in state.get(JOURNAL, b""))
    lost = {name: content for name, content in state.items() if not name.endswith("00001-of-00002.safetensors")}
    expected = artifacts(bench.out)
    monkeypatch.setattr(bench, "out", put_back(lost, tmp_path / "out"))
    monkeypatch.setattr(apply, "compress_layer", stop)
    assert bench.run().exit_code == 130
    monkeypatch.setattr(apply, "compress_layer", compress_layer)
    bench.finish()
    assert artifacts(bench.out) == expected


def test_files_of_two_plans_are_not_taken_for_one(tmp_path: Path) -> None:
    """A kill between their renames leaves the new plan.safetensors with the old plan.json."""
    bench = Workbench(tmp_path)
    bench.finish()
    before, old = artifacts(bench.out), (bench.out / "plan.json").read_bytes()
    bench.finish("plan.keep=6")
    (bench.out / "plan.json").write_bytes(old)
    assert stages(bench.run()) == ["plan", "apply"]
    assert artifacts(bench.out) == before


def test_what_a_run_that_was_killed_before_left_is_not_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same recipe on a source that has lost a file since."""

    def stop(*arguments: object) -> None:
        raise KeyboardInterrupt

    bench = Workbench(tmp_path)
    (bench.model / "notes.txt").write_text("old")
    monkeypatch.setattr(apply, "verify", stop)
    assert bench.run().exit_code == 130
    assert (bench.out / ".partial/model/notes.txt").exists()
    monkeypatch.undo()
    (bench.model / "notes.txt").unlink()
    after_it = hashes(bench.finish())
    bench.out = tmp_path / "clean"
    assert after_it == hashes(bench.finish())
