"""The sets of values that an option of a component may hold: checked in recipes, written into the schema."""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from dernkit.sentences import expected


@runtime_checkable
class Shape(Protocol):
    """The set of values that an option may have."""

    def parse(self, value: Any, base: Path) -> Any:
        """The component's value for a plain one; relative paths start at ``base``. Raises ValueError."""
        ...

    def schema(self) -> dict[str, Any]:
        """The same set as JSON Schema."""
        ...


@dataclass(frozen=True, slots=True)
class Flag:
    """``bool``."""

    def parse(self, value: Any, base: Path) -> bool:
        if not isinstance(value, bool):
            raise ValueError(expected("true or false", value))
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Text:
    """``str``."""

    def parse(self, value: Any, base: Path) -> str:
        if not isinstance(value, str):
            raise ValueError(expected("text", value))
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "string"}


@dataclass(frozen=True, slots=True)
class FilePath:
    """``Path``; becomes absolute, so that a resolved recipe means the same everywhere on one machine."""

    def parse(self, value: Any, base: Path) -> Path:
        if isinstance(value, Path):
            value = str(value)
        if not isinstance(value, str) or not value:
            raise ValueError(expected("a path", value))
        return Path(os.path.abspath(base / value))

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "minLength": 1}


@dataclass(frozen=True, slots=True)
class Choice:
    """``Literal``."""

    values: tuple[Any, ...]

    def parse(self, value: Any, base: Path) -> Any:
        if not any(value == known and type(value) is type(known) for known in self.values):
            words = ", ".join(map(str, self.values))
            raise ValueError(expected(f"one of {words}" if len(self.values) > 1 else words, value))
        return value

    def schema(self) -> dict[str, Any]:
        return {"enum": list(self.values)}


@dataclass(frozen=True, slots=True)
class Number:
    """``int`` or ``float`` between two bounds, each of which may be excluded."""

    integer: bool
    low: float
    high: float
    above_low: bool = False
    below_high: bool = False

    def parse(self, value: Any, base: Path) -> int | float:
        if isinstance(value, bool) or not isinstance(value, int if self.integer else int | float):
            raise ValueError(expected("an integer" if self.integer else "a number", value))
        above = self.low < value if self.above_low else self.low <= value
        below = value < self.high if self.below_high else value <= self.high
        if not (above and below):
            raise ValueError(expected(self._range(), value))
        return value if self.integer else float(value)

    def schema(self) -> dict[str, Any]:
        low = "exclusiveMinimum" if self.above_low else "minimum"
        high = "exclusiveMaximum" if self.below_high else "maximum"
        return {"type": "integer" if self.integer else "number", low: self.low, high: self.high}

    def _range(self) -> str:
        if not (self.above_low or self.below_high):
            return f"between {_bound(self.low)} and {_bound(self.high)}"
        low, high = "above" if self.above_low else "at least", "below" if self.below_high else "at most"
        return f"{low} {_bound(self.low)} and {high} {_bound(self.high)}"


@dataclass(frozen=True, slots=True)
class Several:
    """``tuple[Literal | str, ...]``."""

    entry: Choice | Text

    def parse(self, value: Any, base: Path) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError(expected("a list", value))
        return tuple(self.entry.parse(entry, base) for entry in value)

    def schema(self) -> dict[str, Any]:
        return {"type": "array", "items": self.entry.schema()}


@dataclass(frozen=True, slots=True)
class Maybe:
    """``X | None``."""

    inner: Shape

    def parse(self, value: Any, base: Path) -> Any:
        return None if value is None else self.inner.parse(value, base)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [self.inner.schema(), {"type": "null"}]}


@dataclass(frozen=True, slots=True)
class Nested:
    """Another component, named by its kind; `dernkit.binding` reads it from ``{use: ...}``."""

    kind: str

    def parse(self, value: Any, base: Path) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {"$ref": f"#/$defs/{self.kind}"}


def plain(value: Any, base: Path | None = None) -> Any:
    """A value as YAML and JSON hold it; a component becomes ``{use: name, option: value}`` with all its options.

    Paths are absolute, or as they are seen from ``base``, so that they mean the same on another machine.
    """
    if is_dataclass(value) and not isinstance(value, type):
        options = {field.name: plain(getattr(value, field.name), base) for field in fields(value)}
        return {"use": value.name} | options  # type: ignore[attr-defined]
    if isinstance(value, Path):
        return str(value) if base is None else Path(os.path.relpath(value, base)).as_posix()
    return [plain(entry, base) for entry in value] if isinstance(value, tuple) else value


def _bound(value: float) -> float:
    whole = isinstance(value, float) and value.is_integer() and abs(value) < 1e15
    return int(value) if whole else value
