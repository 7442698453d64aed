"""The options of a component: read off the annotations of its fields."""

from __future__ import annotations

import ast
import inspect
import math
import textwrap
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, Field, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt

from dernkit.shapes import Choice, FilePath, Flag, Maybe, Nested, Number, Several, Shape, Text


@dataclass(frozen=True, slots=True)
class Option:
    """One option of a component."""

    name: str
    shape: Shape
    default: Any
    """``dataclasses.MISSING`` when a recipe must give it."""
    summary: str

    @property
    def required(self) -> bool:
        """Whether a recipe must give it."""
        return self.default is MISSING

    @property
    def nested(self) -> str | None:
        """The kind of component that it holds, if it holds one."""
        shape = self.shape.inner if isinstance(self.shape, Maybe) else self.shape
        return shape.kind if isinstance(shape, Nested) else None


def options_of(cls: type, fields: tuple[Field[Any], ...], protocols: Mapping[Any, str]) -> tuple[Option, ...]:
    """The options that a dataclass's fields declare.

    Args:
        protocols: protocol of `dernkit.api` -> kind, for options that hold another component.

    Raises:
        ValueError: a field is untyped, unbounded, or its default is outside its own bounds.
    """
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
        raise ValueError(f"option types must exist at run time. Got {found} instead.") from error
    summaries = _attribute_docstrings(cls)
    return tuple(_option(field, hints[field.name], summaries.get(field.name, ""), protocols) for field in fields)


def shape_of(annotation: Any, protocols: Mapping[Any, str], metadata: tuple[Any, ...] = ()) -> Shape:
    """The shape that an annotation stands for; raises ValueError when it is not one of those allowed."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return shape_of(arguments[0], protocols, metadata + arguments[1:])
    if origin in (Union, types.UnionType):
        inner = [argument for argument in arguments if argument is not type(None)]
        if len(inner) == 1 and len(arguments) == 2:
            return Maybe(shape_of(inner[0], protocols, metadata))
    if origin is Literal:
        return Choice(arguments)
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        entry = shape_of(arguments[0], protocols)
        if isinstance(entry, Choice | Text):
            return Several(entry)
    if annotation is int or annotation is float:
        return _number(annotation, metadata)
    plain: dict[Any, Shape] = {bool: Flag(), str: Text(), Path: FilePath()}
    if annotation in plain:
        return plain[annotation]
    if annotation in protocols:
        return Nested(protocols[annotation])
    raise ValueError(
        "must be bool, str, Path, Literal, a bounded int or float, a tuple of str or Literal, a component, or one of "
        f"these or None. Got {annotation} instead."
    )


def _option(field: Field[Any], annotation: Any, summary: str, protocols: Mapping[Any, str]) -> Option:
    try:
        shape = shape_of(annotation, protocols)
        default = field.default_factory() if field.default_factory is not MISSING else field.default
        if default is not MISSING:
            shape.parse(default, Path())
    except ValueError as error:
        raise ValueError(f"option '{field.name}' {error}") from error
    return Option(field.name, shape, default, summary)


def _number(annotation: type, metadata: tuple[Any, ...]) -> Number:
    low = high = None
    for bound in _bounds(metadata):
        if isinstance(bound, Ge | Gt):
            low = (bound.ge, False) if isinstance(bound, Ge) else (bound.gt, True)
        elif isinstance(bound, Le | Lt):
            high = (bound.le, False) if isinstance(bound, Le) else (bound.lt, True)
    if low is None or high is None or not (math.isfinite(low[0]) and math.isfinite(high[0])):  # type: ignore[arg-type]
        name = annotation.__name__
        raise ValueError(
            f"must have a finite lower and upper bound. Got a free {name} instead. "
            f"Write Annotated[{name}, Interval(ge=..., le=...)]."
        )
    return Number(annotation is int, _plain(low[0]), _plain(high[0]), low[1], high[1])


def _plain(bound: Any) -> int | float:
    """1 for 1.0: typing caches annotations by equality, so that either may come for the other."""
    return int(bound) if float(bound).is_integer() else float(bound)


def _bounds(metadata: tuple[Any, ...]) -> Iterator[Any]:
    for entry in metadata:
        if isinstance(entry, GroupedMetadata):
            yield from entry
        else:
            yield entry


def _attribute_docstrings(cls: type) -> dict[str, str]:
    """Field name -> the string literal below it in the source, when the source can be read."""
    try:
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return {}
    if not isinstance(body, ast.ClassDef):
        return {}
    found = {}
    for statement, after in zip(body.body, body.body[1:], strict=False):
        match statement, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found
