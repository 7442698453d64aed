"""Which layers of a result are on the disk, for a run that goes on after a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

JOURNAL = ".journal.json"


def began(folder: Path, key: str) -> bool:
    """Whether ``folder`` holds what a killed call of `apply_checkpoint` made under ``key``."""
    return _read(folder / JOURNAL).get("key") == key


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


class Journal:
    """Which layers are on the disk, for a run that goes on after a kill. It is there before any shard is."""

    def __init__(self, file: Path, key: str, *, fresh: bool) -> None:
        self._file, self._key = file, key
        stored = _read(file)
        found = {} if fresh or stored.get("key") != key else stored
        self.done: list[int | str] = found.get("done", [])
        self.facts: dict[str, Any] = found.get("facts", {})
        """What is to be remembered of layers, by their numbers."""
        self._write()

    def add(self, layer: int | str, facts: Any = None) -> None:
        self.done.append(layer)
        if facts is not None:
            self.facts[str(layer)] = facts
        self._write()

    def _write(self) -> None:
        temporary = self._file.with_suffix(".tmp")
        temporary.write_text(json.dumps({"key": self._key, "done": self.done, "facts": self.facts}), encoding="utf-8")
        os.replace(temporary, self._file)

    def remove(self) -> None:
        self._file.unlink(missing_ok=True)
