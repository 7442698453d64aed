"""A run directory: whom it may belong to, one run at a time, every file replaced as a whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from dernkit.artifacts import exclusive, publish, read_json, restore
from dernkit.errors import CheckpointError
from dernkit.memory import measured

LOCK, STATS, PLAN, MOVES, MODEL, EVAL, RECORD = (
    "recipe.lock.yaml",
    "stats.safetensors",
    "plan.json",
    "plan.safetensors",
    "model",
    "eval.json",
    "run.json",
)
_PARTIAL, _LOCK_FILE = ".partial", ".lock"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """The directory ``out`` of a run; see the reference of run directories for the files in it."""

    out: Path

    @property
    def partial(self) -> Path:
        """Where unfinished work lies."""
        return self.out / _PARTIAL

    def tidy(self) -> None:
        """Remove what unfinished work has left."""
        shutil.rmtree(self.partial, ignore_errors=True)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """The run directory, made and locked; made for nothing (no stage came to its end), it goes again."""
        made = not self.out.exists()
        self.out.mkdir(parents=True, exist_ok=True)
        with exclusive(self.out / _LOCK_FILE):
            try:
                restore(self.partial / MODEL, self.out / MODEL)
                yield
            except Exception:
                if made and not (self.out / RECORD).exists():
                    self._remove()
                raise

    def _remove(self) -> None:
        for name in (LOCK, _LOCK_FILE):
            (self.out / name).unlink(missing_ok=True)
        shutil.rmtree(self.partial, ignore_errors=True)
        with suppress(OSError):  # somebody has put something else there
            self.out.rmdir()

    def check(self, model: Path) -> None:
        """Refuse a directory inside the model's, around it, or with other files in it.

        Raises:
            CheckpointError: it is one of those.
        """
        out, path = self.out.resolve(), model.resolve()
        if out == path or path in out.parents:
            raise CheckpointError(
                f"--out: must lie outside the model's directory. Got '{self.out}', which is inside '{model}', "
                f"instead. Choose another directory."
            )
        if out in path.parents:
            raise CheckpointError(
                f"--out: must not hold the model that is read. Got '{self.out}' for '{model}' instead. "
                f"Choose another directory."
            )
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"--out: must be a directory. Got the file '{self.out}' instead.")
        if out.is_dir() and any(out.iterdir()) and not (out / LOCK).exists() and not (out / _LOCK_FILE).exists():
            raise CheckpointError(
                f"--out: must be empty, new, or an earlier run. Got '{self.out}', which holds other files, instead. "
                f"Choose another directory."
            )

    def stage(self, name: str, done: bool, work: Callable[[], None]) -> None:
        """Do the work unless it is done; record what it took."""
        if done:
            return
        (self.partial).mkdir(exist_ok=True)
        with measured() as cost:
            work()
        stages = read_json(self.out / RECORD).get("stages", {}) | {name: asdict(cost)}
        self.write(RECORD, json.dumps({"stages": stages}, indent=1) + "\n")

    def write(self, name: str, text: str) -> None:
        """A text file, replaced as a whole; one that has this text already is left alone."""
        place = self.out / name
        if not place.exists() or place.read_bytes() != text.encode():
            with self.renamed(name) as file:
                file.write_text(text, encoding="utf-8")

    @contextmanager
    def renamed(self, name: str) -> Iterator[Path]:
        """A temporary file that takes its place when the block ends without an error."""
        temporary = self.partial / name
        temporary.parent.mkdir(exist_ok=True)
        yield temporary
        publish(temporary, self.out / name)
