"""Processes that share tasks: order, failures, ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dernkit.compare.cells import Cell, Context, Subject, Task
from dernkit.compare.workers import run_tasks
from dernkit.errors import CheckpointError, DernkitError, RecipeError
from dernkit.registry import Registry
from tests.unit.comparing import Comparing
from tests.unit.workbench import dernkit, said, succeeded


def cell(model: str, calibration: str, number: int) -> Cell:
    subject = Subject(model, Path(model), model, 8, (0, 0, 0), (), {}, [])
    return Cell(str(number), Context(subject, calibration, key=calibration), "recipe", 0.5, None, {})


def do_nothing() -> Callable[[Task], None]:
    return lambda task: None


def fail() -> Callable[[Task], None]:
    def work(task: Task) -> None:
        raise {"0": RecipeError("plan.keep: must be less."), "1": ZeroDivisionError("nothing there")}[task.key]

    return work


def die() -> Callable[[Task], None]:
    return lambda task: os._exit(7)


def test_what_is_at_hand_is_used_first() -> None:
    tasks = [cell("a", "x", 0), cell("b", "x", 1), cell("a", "y", 2), cell("a", "x", 3), cell("b", "x", 4)]
    order: list[str] = []
    run_tasks(tasks, do_nothing, lambda task, _: order.append(task.key), jobs=1)
    assert order == ["0", "3", "2", "1", "4"]


def test_several_processes_do_every_task_once() -> None:
    done: list[str] = []
    run_tasks(
        [cell("a", "x", number) for number in range(9)], do_nothing, lambda task, _: done.append(task.key), jobs=2
    )
    assert sorted(done) == [str(number) for number in range(9)]


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_error_of_dernkit_is_its_sentence_and_another_one_names_the_task(jobs: int) -> None:
    for number, kind, sentence in (
        (0, RecipeError, "plan.keep: must be less."),
        (1, CheckpointError, "a, recipe: must come to its end. Got 'ZeroDivisionError: nothing there' instead. …"),
    ):
        tasks = [cell("a", "x", number), cell("a", "x", number)]
        with pytest.raises(DernkitError) as caught:
            run_tasks(tasks, fail, lambda *_: None, jobs=jobs)
        assert type(caught.value) is kind and str(caught.value).startswith(sentence.rstrip("…"))


def test_a_process_that_dies_is_named_by_its_task() -> None:
    with pytest.raises(CheckpointError, match=r"a, recipe: its process must live to the end\. Got exit code 7 instead"):
        run_tasks([cell("a", "x", number) for number in range(2)], die, lambda *_: None, jobs=2)


@pytest.fixture
def comparing(tmp_path: Path) -> Comparing:
    return Comparing(tmp_path)


def test_the_command_prints_where_results_and_report_are(comparing: Comparing) -> None:
    out = comparing.root / "out"
    printed = succeeded(dernkit("compare", str(comparing.file), "--out", str(out), "--set", "seeds=[0]")).stdout
    assert printed.splitlines()[0] == f"results: {out / 'results.parquet'}"
    assert f"report:  {out / 'report.html'}" in printed
    assert (out / "report.html").stat().st_size > 10_000


def test_an_interrupted_comparison_says_that_it_goes_on(comparing: Comparing, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dernkit.compare.measure.Laboratory.measure", interrupt)
    result = dernkit("compare", str(comparing.file), "--out", str(comparing.out))
    assert said(result, 130) == "interrupted; the same command goes on where it was"


@pytest.mark.slow
@pytest.mark.parametrize("cells", [0, 1, 4, 8])
def test_a_killed_comparison_leaves_no_process_and_goes_on(
    comparing: Comparing, registry: Registry, cells: int
) -> None:
    comparing.compare(registry)
    expected, comparing.out = comparing.results(), comparing.root / "killed"
    command = [
        sys.executable,
        "-m",
        "dernkit",
        "compare",
        str(comparing.file),
        "--out",
        str(comparing.out),
        "--jobs",
        "2",
    ]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    while process.poll() is None and len(list(comparing.out.glob("cells/*"))) < max(cells, 1) - (cells == 0):
        time.sleep(0.02)
    while cells == 0 and process.poll() is None and not _children(process.pid):
        time.sleep(0.02)
    workers = _children(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and workers
    deadline = time.monotonic() + 60
    while any(_alive(worker) for worker in workers):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (comparing.out / "results.parquet").exists()
    comparing.compare(registry)
    assert comparing.results() == expected


def _children(parent: int) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except (FileNotFoundError, ProcessLookupError):
        return False
