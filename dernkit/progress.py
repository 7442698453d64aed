"""Progress of long work: bars on a terminal, plain lines elsewhere, nothing when used as a library."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, runtime_checkable


@runtime_checkable
class Tracker(Protocol):
    """Counts steps of one piece of work."""

    def advance(self, steps: int = 1, note: str = "") -> None:
        """``steps`` more are done; ``note`` says where the work is (a layer, a task)."""
        ...


@runtime_checkable
class Progress(Protocol):
    """Opens trackers."""

    def track(self, what: str, total: int, unit: str) -> AbstractContextManager[Tracker]:
        """Follow ``total`` steps counted in ``unit`` (tokens, layers)."""
        ...


class _NoTracker:
    def advance(self, steps: int = 1, note: str = "") -> None:
        """Nothing."""


class Silent:
    """No output."""

    def track(self, what: str, total: int, unit: str) -> AbstractContextManager[Tracker]:
        """A tracker that shows nothing."""
        return nullcontext(_NoTracker())


class Lines:
    """One plain line to stderr at most every ``every`` seconds: for logs and pipes."""

    def __init__(self, every: float = 10.0) -> None:
        self._every = every

    @contextmanager
    def track(self, what: str, total: int, unit: str) -> Iterator[Tracker]:
        """A tracker that prints rate and remaining time."""
        tracker = _LineTracker(what, total, unit, self._every)
        yield tracker
        tracker.close()


class _LineTracker:
    def __init__(self, what: str, total: int, unit: str, every: float) -> None:
        self._what, self._total, self._unit, self._every = what, total, unit, every
        self._done, self._start = 0, time.monotonic()
        self._last = self._start

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._last >= self._every and self._done < self._total:
            self._last = now
            rate = self._done / (now - self._start)
            left = (self._total - self._done) / rate if rate else 0.0
            note = f", {note}" if note else ""
            print(
                f"{self._what}: {self._done:,}/{self._total:,} {self._unit}{note}, {_rate(rate, self._unit)}, "
                f"{left:.0f} s left",
                file=sys.stderr,
            )

    def close(self) -> None:
        seconds = time.monotonic() - self._start
        print(f"{self._what}: {self._done:,} {self._unit} in {seconds:.1f} s", file=sys.stderr)


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.2g} {unit}/s"


class Bars:
    """A rich progress bar per piece of work."""

    @contextmanager
    def track(self, what: str, total: int, unit: str) -> Iterator[Tracker]:
        """A tracker that draws a bar with rate and remaining time."""
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (
            TextColumn("{task.description:<10}"),
            BarColumn(),
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns) as progress:
            yield _BarTracker(progress, progress.add_task(what, total=total, note="", rate=""), unit)


class _BarTracker:
    def __init__(self, progress: object, task: object, unit: str) -> None:
        self._progress, self._task, self._unit = progress, task, unit

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._progress.update(self._task, advance=steps, note=note)  # type: ignore[attr-defined]
        speed = self._progress.tasks[0].speed  # type: ignore[attr-defined]
        if speed:
            self._progress.update(self._task, rate=_rate(speed, self._unit))  # type: ignore[attr-defined]


def for_terminal() -> Progress:
    """Bars when stderr is a terminal, lines otherwise."""
    return Bars() if sys.stderr.isatty() else Lines()
