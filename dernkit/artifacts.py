"""Files of a run directory: locked while a run lasts, replaced as a whole, marked with what they were made from."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from dernkit.errors import CheckpointError, RecipeError
from dernkit.sentences import reason


@contextmanager
def exclusive(file: Path) -> Iterator[None]:
    """Refuse a second run in the same directory."""
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                f"--out: one run at a time may write '{file.parent}'. Got a second one instead. Wait for the first."
            ) from None
        yield


def publish(file: Path, place: Path) -> None:
    """Rename a finished file into place, readable as the umask says (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
    os.replace(file, place)


def fresh(folder: Path) -> None:
    """Make an empty directory, whatever was there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def replace_folder(new: Path, place: Path) -> None:
    """Rename a finished directory into place; what was there before stays until then."""
    old = new.with_name(new.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def restore(new: Path, place: Path) -> None:
    """Undo the half of `replace_folder` that a kill may have left."""
    old = new.with_name(new.name + ".old")
    if old.exists() and not place.exists():
        os.replace(old, place)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file in a folder."""
    return {file.name: file.stat().st_size for file in sorted(folder.iterdir()) if file.is_file()}


def whole(folder: Path, expected: Mapping[str, int]) -> bool:
    """Whether files of these sizes are all there; others may be, too."""
    return folder.is_dir() and expected.items() <= sizes(folder).items()


def refuse_broken(file: Path) -> None:
    """A plan that a person has edited into something else than JSON is not thrown away."""
    try:
        if file.exists():
            json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(
            f"{file}: must be JSON. Got '{reason(error)}' instead. Correct it, or delete it to plan again."
        ) from None


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if there is none that can be read."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def json_key(file: Path) -> str | None:
    """The digest of inputs that a JSON artifact carries."""
    return read_json(file).get("key")


def safetensors_key(file: Path) -> str | None:
    """The digest of inputs that a safetensors artifact carries."""
    try:
        with safe_open(file, "pt") as stored:
            return (stored.metadata() or {}).get("key")
    except (OSError, SafetensorError):
        return None
