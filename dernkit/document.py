"""A recipe as it was written: plain data, and for each value the line or ``--set`` that it comes from."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from dernkit.errors import RecipeError
from dernkit.sentences import shown

Keys = tuple[str | int, ...]
"""Where a value is, from the top: mapping keys and list positions."""


_TAG = "tag:yaml.org,2002:"
_TAGS = frozenset({"map", "seq", "str", "null", "bool", "int", "float"})


class _Syntax(yaml.SafeLoader):
    """YAML 1.2's core scalars: ``1e-3`` is a number; ``on``, ``010`` and ``2026-01-01`` are not booleans or dates."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012  (PyYAML's own name and form)


for _tag, _pattern, _first in (
    ("null", r"(?:~|null|Null|NULL|)", ["~", "n", "N", ""]),
    ("bool", r"(?:true|True|TRUE|false|False|FALSE)", list("tTfF")),
    ("int", r"[-+]?[0-9]{1,30}", list("-+0123456789")),
    ("float", r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _Syntax.add_implicit_resolver(f"{_TAG}{_tag}", re.compile(f"^{_pattern}$"), _first)


_NODE_NAMES = {yaml.ScalarNode: "a plain value", yaml.SequenceNode: "a list", yaml.MappingNode: "a mapping"}


@dataclass(slots=True)
class Document:
    """Plain data with origins; collects problems until :meth:`raise_problems`.

    Args:
        name: what the recipe is called in messages.
        base: folder from which the recipe's relative paths start.
        located: whether values have lines (else problems are located by their keys alone).
    """

    name: str
    base: Path
    data: Any = None
    located: bool = False
    overrides_base: Path = Path()
    """Folder from which relative paths in overrides start."""
    lines: dict[Keys, int] = field(default_factory=dict)
    overridden: set[Keys] = field(default_factory=set)
    problems: list[tuple[float, str]] = field(default_factory=list)

    def problem(self, keys: Keys, sentence: str) -> None:
        """Notes that the value at ``keys`` must be otherwise."""
        label = ".".join(map(str, keys))
        if self._is_overridden(keys):
            self.problems.append((float("inf"), f"--set {label}: {sentence}"))
        elif self.located:
            line = self._line(keys)
            self.problems.append((line, f"{self.name}:{line}: {label}{': ' if label else ''}{sentence}"))
        else:
            self.problems.append((0, f"{label}{': ' if label else ''}{sentence}"))

    def base_of(self, keys: Keys) -> Path:
        """The folder from which a relative path at ``keys`` starts."""
        return self.overrides_base if self._is_overridden(keys) else self.base

    def raise_problems(self) -> None:
        """Raises one RecipeError with all problems, in the order of their lines."""
        if self.problems:
            ordered = [text for _, text in sorted(self.problems, key=lambda problem: problem[0])]
            count = f"{len(ordered)} problem{'s' if len(ordered) > 1 else ''} in {self.name}"
            raise RecipeError("\n".join([count, *ordered]))

    def _is_overridden(self, keys: Keys) -> bool:
        return any(keys[:length] in self.overridden for length in range(1, len(keys) + 1))

    def _line(self, keys: Keys) -> int:
        known = (self.lines[keys[:length]] for length in range(len(keys), -1, -1) if keys[:length] in self.lines)
        return next(known, 1)


def read_document(path: Path) -> Document:
    """A recipe file with the line of every key.

    Raises:
        RecipeError: there is no such file, or it is not one YAML mapping.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
        raise RecipeError(f"{path}: must be a text file in UTF-8. Got {found} instead.") from None
    except FileNotFoundError:
        raise RecipeError(f"{path}: must be a file. Got a path where nothing is instead.") from None
    except OSError as error:
        raise RecipeError(f"{path}: must be a file that can be read. Got '{error.strerror}' instead.") from None
    document = Document(str(path), path.parent, located=True)
    try:
        node = _compose(text)
    except _NotYamlError as fault:
        raise RecipeError(f"{path}:{fault.line}: {fault}") from None
    if not isinstance(node, yaml.MappingNode):
        found = "an empty file" if node is None else _NODE_NAMES[type(node)]
        line = 1 if node is None else node.start_mark.line + 1
        raise RecipeError(f"{path}:{line}: must be a mapping that starts with 'dernkit: 1'. Got {found} instead.")
    document.lines[()] = node.start_mark.line + 1
    document.data = _plain(node, (), document, ())
    return document


def override(document: Document, settings: Iterable[str]) -> None:
    """Puts ``dotted.path=value`` settings into a document; the value is YAML."""
    for setting in settings:
        path, separator, text = setting.partition("=")
        keys = path.strip().split(".")
        try:
            if not separator or "" in keys:
                raise ValueError(f"must be written as path.to.key=value. Got {shown(setting)} instead.")
            _put(document, keys, _compose(text))
        except ValueError as error:
            document.problems.append((float("inf"), f"--set {path.strip()}: {error}"))


def _put(document: Document, keys: list[str], node: yaml.Node | None) -> None:
    """Replaces or adds one value; missing mappings on the way are made."""
    place, where = document.data, tuple[str | int, ...]()
    for above, key in enumerate(keys, start=1):
        where = (*where, _step(place, key, ".".join(keys[: above - 1])))
        if above == len(keys):
            document.overridden.add(where)
            place[where[-1]] = None if node is None else _plain(node, where, document, ())
        elif isinstance(place, dict) and place.get(key) is None:
            document.overridden.add(where)
            place[key] = {}
        place = place[where[-1]]


def _step(place: Any, key: str, label: str) -> str | int:
    """The key or position in ``place`` that one word of a setting's path means."""
    if isinstance(place, dict):
        return key
    if not isinstance(place, list):
        raise ValueError(f"must be in a mapping. Got {shown(place)} at '{label}' instead.")
    if not key.isdecimal() or int(key) >= len(place):
        raise ValueError(f"must name one of the {len(place)} entries of '{label}', from 0. Got {shown(key)} instead.")
    return int(key)


def _compose(text: str) -> yaml.Node | None:
    """The syntax tree of one YAML document, None for empty text."""
    try:
        return _compose_single(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        written = [*text.splitlines(), ""][line - 1]
        if "\t" in written[: len(written) - len(written.lstrip())]:
            raise _NotYamlError(line, "must be indented with spaces. Got a tab instead.") from None
        raise _NotYamlError(line, f"must be valid YAML. Got '{error.problem or error.context}' instead.") from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise _NotYamlError(line, f"must be text. Got the character {text[error.position]!a} instead.") from None
    except RecursionError:
        raise _NotYamlError(1, "must not be nested this deeply. Got hundreds of levels instead.") from None


class _NotYamlError(ValueError):
    """Text that is not YAML, and the line where that shows."""

    def __init__(self, line: int, sentence: str) -> None:
        super().__init__(sentence)
        self.line = line


def _compose_single(text: str) -> yaml.Node | None:
    loader = _Syntax(text)
    try:
        return loader.get_single_node()
    finally:
        loader.dispose()


def _plain(node: yaml.Node, keys: Keys, document: Document, above: tuple[yaml.Node, ...]) -> Any:
    """A node's plain data; notes lines, duplicate keys and tags."""
    if len(above) > 50:
        document.problem(keys, "must not be nested this deeply. Got over 50 levels instead.")
        return None
    if any(node is outer for outer in above):
        document.problem(keys, "must not contain itself. Got an alias of what it is in instead.")
        return None
    if node.tag.removeprefix(_TAG) not in _TAGS:
        document.problem(keys, f"must be plain YAML. Got the tag {node.tag.removeprefix(_TAG)} instead.")
        return None
    if isinstance(node, yaml.MappingNode):
        return _plain_mapping(node, keys, document, (*above, node))
    if isinstance(node, yaml.SequenceNode):
        for position, entry in enumerate(node.value):
            document.lines[(*keys, position)] = entry.start_mark.line + 1
        return [_plain(entry, (*keys, i), document, (*above, node)) for i, entry in enumerate(node.value)]
    return _scalar(node, keys, document)


def _plain_mapping(
    node: yaml.MappingNode, keys: Keys, document: Document, above: tuple[yaml.Node, ...]
) -> dict[str, Any]:
    data: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else _NODE_NAMES[type(key_node)]
        where = (*keys, key)
        if key in data:
            first = document.lines[where]
            document.lines[where] = line
            document.problem(where, f"must be given once. Got it again instead; it is first given in line {first}.")
            document.lines[where] = first
            continue
        document.lines[where] = line
        data[key] = _plain(value_node, where, document, above)
    return data


def _scalar(node: yaml.Node, keys: Keys, document: Document) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    try:
        return {"int": int, "float": float}.get(kind, str)(text)
    except ValueError:
        document.problem(keys, f"must be what its tag {kind} says. Got {shown(text)} instead.")
        return None
