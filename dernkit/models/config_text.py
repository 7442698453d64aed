"""Edits of ``config.json`` as text: named fields change their value or go, every other byte stays.

Rewriting a config through transformers would rename fields and drop legacy keys that other runtimes read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from json.decoder import JSONDecodeError, scanstring  # type: ignore[attr-defined]

from dernkit.errors import CheckpointError

Path = tuple[str | int, ...]
"""Keys and list indices from the root to a value."""

_SPACE = re.compile(r"[ \t\r\n]*")


def value_spans(text: str) -> dict[Path, tuple[int, int]]:
    """Start and end of every value in a JSON text, by its path."""
    spans: dict[Path, tuple[int, int]] = {}
    _walk(text, 0, (), spans)
    return spans


def _skip(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _walk(text: str, at: int, path: Path, spans: dict[Path, tuple[int, int]]) -> int:
    start = at = _skip(text, at)
    if text[at : at + 1] in ("{", "["):
        closing, count = ("}" if text[at] == "{" else "]"), 0
        at = _skip(text, at + 1)
        while text[at] != closing:
            key: str | int = count
            if closing == "}":
                key, at = scanstring(text, at + 1)
                at = _skip(text, at) + 1  # past the colon
            at = _skip(text, _walk(text, at, (*path, key), spans))
            if text[at] == ",":
                at = _skip(text, at + 1)
            count += 1
        at += 1
    else:
        _, at = json.JSONDecoder().raw_decode(text, at)
    spans[path] = (start, at)
    return at


Value = int | str | list[int]


def edit(text: str, changes: Mapping[tuple[str, ...], Value]) -> str:
    """The same text with the values at ``changes``' paths replaced; an absent key is inserted first in its object.

    Raises:
        CheckpointError: the text is not JSON, or the object that should hold a path does not exist.
    """
    spans = _checked_spans(text)
    edits: list[tuple[int, int, str]] = []
    absent: dict[Path, dict[str, Value]] = {}
    for path, value in changes.items():
        if path in spans:
            edits.append((*spans[path], json.dumps(value)))
        else:
            absent.setdefault(path[:-1], {})[path[-1]] = value
    for owner, fields in absent.items():
        brace = _brace(text, spans, owner) + 1
        first = _skip(text, brace)
        gap, last = text[brace:first], "" if text[first] == "}" else ","
        new = ",".join(f"{gap}{json.dumps(key)}: {json.dumps(value)}" for key, value in fields.items())
        edits.append((brace, brace, new + last))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def remove(text: str, paths: Iterable[Path]) -> str:
    """The same text without the keys at ``paths`` and one comma beside each of them.

    Raises:
        CheckpointError: the text is not JSON.
    """
    for path in paths:
        while path in (spans := _checked_spans(text)):  # JSON allows a key twice
            owner, end = spans[path[:-1]][0] + 1, spans[path][1]
            before = [stop for key, (_, stop) in spans.items() if key[:-1] == path[:-1] and owner < stop < end]
            after = _skip(text, end)
            if before:
                text = text[: max(before)] + text[end:]
            elif text[after] == ",":
                text = text[: _skip(text, owner)] + text[_skip(text, after + 1) :]
            else:
                text = text[:owner] + text[after:]
    return text


def _checked_spans(text: str) -> dict[Path, tuple[int, int]]:
    try:
        json.loads(text)
    except JSONDecodeError as error:
        raise CheckpointError(f"config.json: must be JSON. Got '{error}' instead. Download it again.") from None
    return value_spans(text)


def _brace(text: str, spans: Mapping[Path, tuple[int, int]], path: Path) -> int:
    """Where the object at ``path`` begins."""
    if path in spans and text[spans[path][0]] == "{":
        return spans[path][0]
    found = "something else" if path in spans else "none"
    where = f"'{'.'.join(map(str, path))}'" if path else "at its top"
    raise CheckpointError(f"config.json: must have an object {where}. Got {found} instead. Download it again.")
