"""Processes that share the tasks of a comparison: each takes those that need what it has at hand first."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from dernkit.compare.cells import Context, Task
from dernkit.errors import CheckpointError, DernkitError
from dernkit.sentences import reason

Work = Callable[[Task], None]
Done = Callable[[Task, float], None]
"""Told when a task is done: which one, and the seconds that it took."""


def run_tasks(tasks: Sequence[Task], make: Callable[[], Work], done: Done, *, jobs: int) -> None:
    """Do all tasks, with one torch thread each, so that ``jobs`` changes no bit of a result.

    Args:
        tasks: in the order in which they are begun.
        make: makes what works, once in each process; it can be pickled if there is more than one.
        done: is called in this process.
        jobs: processes; 1 is this one.

    Raises:
        DernkitError: a task failed, with its name where that is not dernkit's own sentence. The others are abandoned.
    """
    queue = _Queue(list(tasks))
    if jobs == 1 or len(tasks) == 1:
        _here(queue, make, done)
        return
    workers = [_Worker.start(make) for _ in range(min(jobs, len(tasks)))]
    try:
        for worker in workers:
            worker.give(queue)
        while busy := {worker.connection: worker for worker in workers if worker.task is not None}:
            for connection in wait(list(busy)):
                worker = busy[connection]  # type: ignore[index]
                done(*worker.take())
                worker.give(queue)
    finally:
        for worker in workers:
            worker.process.kill()
            worker.process.join()


def _here(queue: _Queue, make: Callable[[], Work], done: Done) -> None:
    with _one_thread():
        work, task = make(), None
        while task := queue.next(task):
            start = time.monotonic()
            with naming(task):
                work(task)
            done(task, time.monotonic() - start)


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def naming(task: Task) -> Iterator[None]:
    """What is not dernkit's own error becomes one that names the task."""
    try:
        yield
    except DernkitError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{task.name}: must come to its end. Got '{type(error).__name__}: {reason(error)}' instead. Once that is "
            f"mended, the same command goes on where it was."
        ) from error


@dataclass(slots=True)
class _Queue:
    """Tasks that nobody has begun."""

    left: list[Task]

    def next(self, last: Task | None) -> Task | None:
        """The first one that needs the calibration of the ``last`` one, or else its model, or else the first."""
        if not self.left:
            return None
        far = [0 if last is None else _distance(task.context, last.context) for task in self.left]
        return self.left.pop(far.index(min(far)))


def _distance(one: Context, other: Context) -> int:
    """What must be got ready: nothing, a calibration, or a model."""
    return 2 if one.subject.name != other.subject.name else int(one.key != other.key)


@dataclass(slots=True)
class _Worker:
    """A process, and what it is doing."""

    process: BaseProcess
    connection: Connection
    task: Task | None = None
    last: Task | None = field(default=None)

    @classmethod
    def start(cls, make: Callable[[], Work]) -> _Worker:
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, make), daemon=True)
        process.start()
        there.close()
        return cls(process, here)

    def give(self, queue: _Queue) -> None:
        """Begin the next task, if there is one."""
        self.task = queue.next(self.last)
        if self.task is not None:
            with suppress(BrokenPipeError):  # it is gone: `take` says so
                self.connection.send(self.task)

    def take(self) -> tuple[Task, float]:
        """The task that is done, and its seconds."""
        assert self.task is not None
        try:
            result = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self.process.join()
            raise CheckpointError(
                f"{self.task.name}: its process must live to the end. Got exit code {self.process.exitcode} instead. "
                f"If memory is short, give fewer --jobs; the same command goes on where it was."
            ) from None
        if isinstance(result, BaseException):
            raise result
        self.last, self.task = self.task, None
        return self.last, result


def _serve(connection: Connection, make: Callable[[], Work]) -> None:
    """The life of a worker process: it ends with the one that started it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(1)
    work: Work | None = None
    with suppress(EOFError):
        while True:
            task: Task = connection.recv()
            start = time.monotonic()
            try:
                with naming(task):
                    work = work or make()
                    work(task)
            except DernkitError as error:
                connection.send(error)
            else:
                connection.send(time.monotonic() - start)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)
