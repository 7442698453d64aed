"""``dernkit compare``: every cell of a bench measured once, each in a file of its own, so that a kill loses little."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from dernkit.artifacts import exclusive, fresh
from dernkit.compare.bench import Bench
from dernkit.compare.cells import Cell, Growth, Task, tasks
from dernkit.compare.work import CELLS, GROWTHS, PARTIAL, RESULTS, STATISTICS, TIMINGS, Places, start
from dernkit.compare.workers import Work, run_tasks
from dernkit.errors import CheckpointError, RecipeError
from dernkit.models.device import CPU
from dernkit.progress import Progress
from dernkit.registry import Registry
from dernkit.sentences import reason

_LOCK = ".lock"


@dataclass(frozen=True, slots=True)
class Comparison:
    """A bench and the directory of its results.

    Args:
        bench: bound.
        out: the directory; made if it does not exist.
        registry: where components come from. Other processes have those of dernkit and, if it has, installed plugins'.
        progress: where to report cells.
        jobs: processes.
        checkpoints: whether each cell's checkpoint is written as well.
        trust_remote_code: whether code that comes with a model may run.
        device: where models run and are compressed.
    """

    bench: Bench
    out: Path
    registry: Registry
    progress: Progress
    jobs: int = 1
    checkpoints: bool = False
    trust_remote_code: bool = False
    device: torch.device = CPU

    def execute(self) -> Path:
        """Measure what is not measured yet; returns the file of all results, in the order of the bench.

        Raises:
            DernkitError: with one sentence; what is measured stays.
        """
        try:
            return self._execute()
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or self.out}: must be readable and writable while a comparison lasts. "
                f"Got '{error.strerror or reason(error)}' instead. Once that is mended, the same command goes on where "
                f"it was."
            ) from error

    def _execute(self) -> Path:
        self._check_out()
        with self.registry.naming_plugins():
            asked = tasks(self.bench, self.registry, trust_remote_code=self.trust_remote_code)
        with self._locked():
            for task in asked:
                self._check_metric(task)
            left = [task for task in asked if self.checkpoints or not self._is_done(task)]
            with self.progress.track("compare", len(asked), "cells") as tracker:
                tracker.advance(len(asked) - len(left), "measured before")

                def done(task: Task, seconds: float) -> None:
                    self._note(task, seconds)
                    self._check_metric(task)
                    tracker.advance(1, task.name)

                run_tasks(left, self._start(), done, jobs=self.jobs)
            return Places(self.out).assemble(asked)

    def _start(self) -> Callable[[], Work]:
        """Makes what works; without the registry it can be sent to other processes."""
        how = functools.partial(start, self.out, self.registry.plugins)
        how = functools.partial(how, checkpoints=self.checkpoints, trust_remote_code=self.trust_remote_code)
        how = functools.partial(how, device=self.device)
        return how if self.jobs > 1 else functools.partial(how, registry=self.registry)

    def _check_out(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise CheckpointError(f"--out: must be a directory. Got the file '{self.out}' instead.")
        known = any((self.out / name).exists() for name in (_LOCK, RESULTS))  # a repository may hold results alone
        if self.out.is_dir() and any(self.out.iterdir()) and not known:
            raise CheckpointError(
                f"--out: must be empty, new, or an earlier comparison. Got '{self.out}', which holds other files, "
                f"instead. Choose another directory."
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        self.out.mkdir(parents=True, exist_ok=True)
        with exclusive(self.out / _LOCK):
            for name in (CELLS, GROWTHS, STATISTICS):
                (self.out / name).mkdir(exist_ok=True)
            fresh(self.out / PARTIAL)
            yield
            fresh(self.out / PARTIAL)

    def _is_done(self, task: Task) -> bool:
        places = Places(self.out)
        return (places.points(task) if isinstance(task, Growth) else places.row(task)) is not None

    def _check_metric(self, task: Task) -> None:
        """An original that is measured has what the report will be about: better to know it now than at the end."""
        row = Places(self.out).row(task) if isinstance(task, Cell) and task.recipe is None else None
        if row is not None and self.bench.metric not in row.observations:
            names = ", ".join(sorted(row.observations)) or "none"
            raise RecipeError(
                f"{self.bench.path}: metric: must be what an evaluator observes. Got '{self.bench.metric}' instead. "
                f"{row.model} has {names}."
            )

    def _note(self, task: Task, seconds: float) -> None:
        """Times are beside the results: these are the same bytes whenever they are made."""
        with (self.out / TIMINGS).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": task.key, "task": task.name, "seconds": round(seconds, 3)}) + "\n")
