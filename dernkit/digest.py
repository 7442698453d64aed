"""Digests of inputs: what a stage's result depends on, and nothing else."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def digest(*parts: Any) -> str:
    """SHA-256 of JSON data, insensitive to the order of keys."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def content_digests(component: Any) -> list[str]:
    """Digests of all files that a component's path options name (folders: their files), nested components included."""
    return [file_digest(file) for path in _paths(component) for file in _files(path)]


def missing_paths(component: Any) -> list[Path]:
    """What a component's path options name, nested components included, and is not there."""
    return [path for path in _paths(component) if not path.exists()]


def _paths(value: Any) -> Iterator[Path]:
    if isinstance(value, Path):
        yield value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _paths(getattr(value, field.name))
    elif isinstance(value, tuple):
        for item in value:
            yield from _paths(item)


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return [path] if path.is_file() else []
