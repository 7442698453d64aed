"""Every state in which a kill could leave a run directory: before each step on the disk, with files half written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

State = dict[str, bytes]


class Moments:
    """The contents of the directory ``out`` at every moment, each state once, in the order of time.

    A kill loses nothing that was handed to the kernel, so what is there before a step is what a kill leaves.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.states: list[State] = []

    def take(self) -> None:
        """Keep what the directory holds now, unless it held the same at the last moment."""
        files = sorted(file for file in self.out.rglob("*") if file.is_file())
        state = {str(file.relative_to(self.out)): file.read_bytes() for file in files}
        if not self.states or state != self.states[-1]:
            self.states.append(state)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Take a copy at every step inside."""
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((os, "replace"), (os, "fsync"), (shutil, "rmtree"), (Path, "unlink")):
                patch.setattr(owner, name, self._before(getattr(owner, name)))
            patch.setattr(os, "posix_fallocate", self._before(os.posix_fallocate))
            patch.setattr(os, "pwrite", self._in_halves(os.pwrite))
            patch.setattr(Path, "write_text", self._torn_text(Path.write_text))
            patch.setattr(shutil, "copyfile", self._torn_copy(shutil.copyfile))
            for stage in ("calibrate", "plan"):
                import_path = f"dernkit.stages.{stage}.save_file"
                patch.setattr(import_path, self._torn_tensors(_resolve(import_path)))
            yield
        self.take()

    def _before(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*arguments: Any, **options: Any) -> Any:
            self.take()
            return step(*arguments, **options)

        return watched

    def _in_halves(self, pwrite: Callable[..., int]) -> Callable[..., int]:
        def watched(descriptor: int, raw: memoryview, at: int) -> int:
            self.take()
            return pwrite(descriptor, raw[: max(1, len(raw) // 2)], at)

        return watched

    def _torn_text(self, write: Callable[..., int]) -> Callable[..., int]:
        def watched(file: Path, text: str, **options: Any) -> int:
            self.take()
            write(file, text[: len(text) // 2], **options)
            self.take()
            return write(file, text, **options)

        return watched

    def _torn_copy(self, copy: Callable[..., Any]) -> Callable[..., Any]:
        def watched(source: Path, target: Path) -> None:
            self.take()
            target.write_bytes(source.read_bytes()[: source.stat().st_size // 2])
            self.take()
            copy(source, target)

        return watched

    def _torn_tensors(self, save: Callable[..., None]) -> Callable[..., None]:
        def watched(tensors: Any, file: Path, **options: Any) -> None:
            self.take()
            save(tensors, file, **options)
            whole = file.read_bytes()
            file.write_bytes(whole[: len(whole) // 2])
            self.take()
            file.write_bytes(whole)

        return watched


def put_back(state: State, out: Path) -> Path:
    """Make a directory that holds a state."""
    for name, content in state.items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)
    return out


def _resolve(path: str) -> Any:
    import importlib

    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)
