"""The words that errors are made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def expected(what: str, value: Any) -> str:
    """The sentence *must be X. Got Y instead.*"""
    return f"must be {what}. Got {shown(value)} instead."


def shown(value: Any) -> str:
    """A value as a recipe would write it, shortened."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    text = repr(str(value) if isinstance(value, Path) else value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def reason(error: BaseException) -> str:
    """What an error of another library says, on one line and shortened."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 240 else f"{text[:237]}..."


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``Did you mean 'reap'?``, or nothing when no known word is near."""
    near = difflib.get_close_matches(name, sorted(known), n=1)
    return f"Did you mean '{near[0]}'?" if near else ""
