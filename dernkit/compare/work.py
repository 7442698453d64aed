"""What a process of a comparison does with a task, and where the results lie."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dernkit.artifacts import publish, read_json
from dernkit.compare.cells import Cell, Growth, Task
from dernkit.compare.measure import Laboratory, statistics_file
from dernkit.compare.rows import Row, read_rows, write_rows
from dernkit.errors import CheckpointError
from dernkit.models.device import CPU, device_of
from dernkit.progress import Silent
from dernkit.registry import Registry
from dernkit.run import Run

RESULTS, STABILITY, TIMINGS = "results.parquet", "stability.json", "timings.jsonl"
CELLS, GROWTHS, STATISTICS, CHECKPOINTS, PARTIAL = "cells", "stability", "statistics", "checkpoints", ".partial"


@dataclass(frozen=True, slots=True)
class Places:
    """The directory of a comparison."""

    out: Path

    def row(self, cell: Cell) -> Row | None:
        """What was measured; None if nothing was, or if the file is something else."""
        try:
            found = read_rows(self._cell(cell))
        except CheckpointError:
            return None
        return found[0] if len(found) == 1 and found[0].key == cell.key else None

    def points(self, growth: Growth) -> list[dict[str, object]] | None:
        """The same for stability."""
        found = read_json(self._growth(growth))
        return found["points"] if found.get("key") == growth.key else None

    def put_row(self, cell: Cell, row: Row) -> None:
        """The row's file, complete or not at all."""
        partial = self._partial(cell)
        write_rows([row], partial)
        publish(partial, self._cell(cell))

    def put_points(self, growth: Growth, points: list[dict[str, object]]) -> None:
        """The same for stability."""
        partial = self._partial(growth)
        partial.write_text(json.dumps({"key": growth.key, "points": points}) + "\n", encoding="utf-8")
        publish(partial, self._growth(growth))

    def checkpoint(self, cell: Cell) -> Path:
        """The run directory of a cell."""
        return self.out / CHECKPOINTS / f"{re.sub(r'[^A-Za-z0-9.=_-]+', '-', cell.name)}-{cell.key[:8]}"

    def assemble(self, tasks: Sequence[Task]) -> Path:
        """All results in the order of the tasks; what these are made from stays."""
        write_rows((row for task in tasks if isinstance(task, Cell) and (row := self.row(task))), self.out / RESULTS)
        growths = [task for task in tasks if isinstance(task, Growth)]
        points = [point for growth in growths for point in self.points(growth) or ()]
        place = self.out / STABILITY
        if growths:
            partial = self.out / PARTIAL / STABILITY
            partial.write_text(json.dumps({"points": points}, indent=0) + "\n", encoding="utf-8")
            publish(partial, place)
        else:
            place.unlink(missing_ok=True)
        return self.out / RESULTS

    def _cell(self, cell: Cell) -> Path:
        return self.out / CELLS / f"{cell.key}.parquet"

    def _growth(self, growth: Growth) -> Path:
        return self.out / GROWTHS / f"{growth.key}.json"

    def _partial(self, task: Task) -> Path:
        return self.out / PARTIAL / f"{task.key}.{os.getpid()}"


def start(
    out: Path,
    plugins: bool,
    *,
    registry: Registry | None = None,
    checkpoints: bool = False,
    trust_remote_code: bool = False,
    device: torch.device = CPU,
) -> Callable[[Task], None]:
    """What does tasks in this process.

    Args:
        out: the comparison's directory.
        plugins: whether installed plugins are loaded, where there is no
        registry: to take components from.
        checkpoints: whether each cell's checkpoint is written as well.
        trust_remote_code: whether code that comes with a model may run.
        device: where models run and are compressed.
    """
    registry = registry or Registry.load(entry_points=plugins)
    device = device_of(str(device))  # each process asks torch for itself to give the same bits in every run
    laboratory, places = Laboratory(registry, out / STATISTICS, trust_remote_code, device), Places(out)

    def work(task: Task) -> None:
        if isinstance(task, Growth):
            places.put_points(task, laboratory.grow(task))
            return
        row = places.row(task)
        if row is None:
            row = laboratory.measure(task)
            places.put_row(task, row)
        if checkpoints and not row.refused:
            _write_checkpoint(task, places, registry, trust_remote_code, device)

    return work


def _write_checkpoint(
    cell: Cell, places: Places, registry: Registry, trust_remote_code: bool, device: torch.device
) -> None:
    """By an ordinary run from disk to disk, which measures nothing again."""
    recipe, path = cell.recipe, cell.context.subject.path
    if recipe is None or recipe.calibrate is None:
        return
    statistics = None if recipe.calibrate.sequential else statistics_file(places.out / STATISTICS, cell.context)
    out = places.checkpoint(cell)
    out.parent.mkdir(exist_ok=True)
    recipe = replace(recipe, evaluators=())
    Run(recipe, str(path), path, out, registry, Silent(), trust_remote_code, statistics, device).execute()
