"""The recipes of a bench: files with overrides, and grids of component options, bound for every cell alike."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dernkit.binding import Binder
from dernkit.document import Document, Keys, override, read_document
from dernkit.errors import RecipeError
from dernkit.recipe import Recipe, bind_document
from dernkit.sentences import expected, shown
from dernkit.shapes import FilePath, Shape, Text

_OWN = (("calibrate",), ("seed",), ("evaluate",), ("report",), ("plan", "keep"))
"""What a bench says itself, for all recipes."""
_SEQUENTIAL = ("calibrate", "sequential")
_UNUSED: Mapping[str, Any] = {"source": {"use": "text-file", "path": "unused"}, "sequences": 1, "length": 2}


@dataclass(frozen=True, slots=True)
class Entry:
    """One recipe as it is written: a file, and values that replace the file's."""

    label: str
    grid: str
    """The grid that it is a point of; its own label where it is in none."""
    file: Path
    settings: tuple[tuple[str, Any], ...]
    keys: Keys
    """Where the bench says so."""


def entries(binder: Binder) -> list[Entry]:
    """All recipes of a bench, in the order in which it names them: `recipes`, then the points of all `grids`."""
    found = [*_recipes(binder), *_grids(binder)]
    if not found:
        binder.problem(("recipes",), "must name a recipe at least. Got nothing instead.")
    seen: set[str] = set()
    for entry in found:
        if entry.label in seen:
            binder.problem(entry.keys, f"labels must be different. Got '{entry.label}' again instead.")
        seen.add(entry.label)
    return found


def bind_entry(entry: Entry, binder: Binder) -> Recipe | None:
    """The recipe, with a keep, seed and calibration that mean nothing yet; problems go to the bench's."""
    bench = binder.document
    try:
        document = read_document(entry.file)
    except RecipeError as error:
        bench.problem(entry.keys, str(error))
        return None
    document.overrides_base = bench.base
    override(document, [f"{key}={json.dumps(value)}" for key, value in entry.settings])
    _leave_to_bench(document)
    recipe = bind_document(document, binder.registry)
    for line, text in document.problems:
        if text.startswith("--set "):  # one that the bench sets
            bench.problem(entry.keys, text.removeprefix("--set "))
        elif (line, text) not in bench.problems:  # several entries may be of one file
            bench.problems.append((line, text))
    return None if document.problems else recipe


def _leave_to_bench(document: Document) -> None:
    data = document.data
    written = data.get("calibrate")
    for name in ("calibrate", "seed", "evaluate", "report"):
        data.pop(name, None)
    sequential = written.get("sequential") if isinstance(written, Mapping) else None
    data["calibrate"] = {**_UNUSED, **({} if sequential is None else {"sequential": sequential})}
    if isinstance(data.get("plan"), dict):
        data["plan"]["keep"] = 1.0


def _recipes(binder: Binder) -> Iterator[Entry]:
    for label in _mapping(binder, ("recipes",)):
        keys: Keys = ("recipes", label)
        value = binder.value(keys)
        if isinstance(value, str):
            yield Entry(label, label, FilePath().parse(value, binder.document.base_of(keys)), (), keys)
        elif binder.section(keys, ("file", "set")):
            file = binder.entry((*keys, "file"), FilePath())
            settings = _settings(binder, (*keys, "set"))
            if file is not None:
                yield Entry(label, label, file, tuple(settings.items()), keys)
        elif not isinstance(value, Mapping):
            binder.problem(keys, expected("the path of a recipe, or a mapping with file and set", value))


def _grids(binder: Binder) -> Iterator[Entry]:
    for number in binder.entries(("grids",)):
        keys: Keys = ("grids", number)
        if not binder.section(keys, ("label", "file", "set", "axes")):
            if binder.value(keys) is None:
                binder.missing(keys)
            continue
        label = binder.entry((*keys, "label"), Text())
        file = binder.entry((*keys, "file"), FilePath())
        settings, axes = _settings(binder, (*keys, "set")), _axes(binder, (*keys, "axes"))
        if label is None or file is None or not axes:
            continue
        short = _short(list(axes))
        for values in itertools.product(*axes.values()):
            point = dict(zip(axes, values, strict=True))
            said = ", ".join(f"{short[key]}={_said(value)}" for key, value in point.items())
            yield Entry(f"{label}[{said}]", label, file, tuple((settings | point).items()), keys)


def _axes(binder: Binder, keys: Keys) -> dict[str, list[Any]]:
    axes: dict[str, list[Any]] = {}
    for name, values in _settings(binder, keys).items():
        if not isinstance(values, list) or not values:
            binder.problem((*keys, name), expected("a list of values", values))
            continue
        axes[name] = values
    if not binder.value(keys):
        binder.problem(keys, "must have an axis at least. Got none instead.")
    return axes


def _settings(binder: Binder, keys: Keys) -> dict[str, Any]:
    """Dotted place in a recipe -> value, without what is the bench's own."""
    found = {}
    for name in _mapping(binder, keys):
        place = tuple(name.split("."))
        own = next((".".join(each) for each in _OWN if place[: len(each)] == each and place != _SEQUENTIAL), None)
        if own is None:
            found[name] = binder.value((*keys, name))
        else:
            binder.problem((*keys, name), f"must not be of '{own}', which a bench says for all. Got {name} instead.")
    return found


def _mapping(binder: Binder, keys: Keys) -> list[str]:
    value = binder.value(keys)
    if value is None:
        return []
    if not isinstance(value, Mapping):
        binder.problem(keys, f"must be a mapping. Got {shown(value)} instead.")
        return []
    return list(value)


def _short(names: Sequence[str]) -> dict[str, str]:
    """The last word of each dotted name, or all of it where two have the same one."""
    last = [name.rpartition(".")[2] for name in names]
    return {name: word if last.count(word) == 1 else name for name, word in zip(names, last, strict=True)}


def _said(value: Any) -> str:
    """A value in a label: of components the name, and the options that are given."""
    if isinstance(value, Mapping):
        options = [f"{key}={_said(each)}" for key, each in value.items() if key != "use"]
        return f"{value.get('use', '')}" + (f"({', '.join(options)})" if options else "")
    if isinstance(value, list):
        return "+".join(map(_said, value))
    return value if isinstance(value, str) else {None: "none", True: "true", False: "false"}.get(value, str(value))


def values(binder: Binder, keys: Keys, shape: Shape, default: Sequence[Any] | None) -> tuple[Any, ...]:
    """Different values of a list at ``keys``, one at least; without a default it must be given."""
    if binder.value(keys) is None and default is not None:
        return tuple(default)
    found = [binder.entry((*keys, position), shape) for position in binder.entries(keys)]
    if binder.value(keys) in (None, []):
        binder.missing(keys)
    for position, value in enumerate(found):
        if value is not None and value in found[:position]:
            binder.problem((*keys, position), f"values must be different. Got {shown(value)} again instead.")
    return tuple(found)
