"""config.json is edited as text: the named numbers change, every other character stays."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dernkit.errors import CheckpointError
from dernkit.models.config_text import edit, value_spans

SPACE = st.text(" \t\r\n", max_size=3)
NAMES = st.text(max_size=6)
SCALARS = st.one_of(
    st.integers(-(10**40), 10**40).map(str),
    st.sampled_from(
        ["true", "false", "null", "-0", "1E+2", "0.5e-3", "1.0", '""', '"\\u00e9\\"}{\\\\"', '"\\/:,"', "NaN"]
    ),
    st.text().map(json.dumps),
    st.text().map(lambda text: json.dumps(text, ensure_ascii=False)),
)


@dataclass
class Piece:
    """Some characters of a JSON text; those of a scalar know where it is."""

    text: str
    path: tuple[str | int, ...] | None = None


@st.composite
def json_pieces(draw: st.DrawFn, path: tuple[str | int, ...] = (), depth: int = 0) -> list[Piece]:
    """A JSON value as it might be written by hand; an object at the top."""
    kinds = ["object"] if depth == 0 else ["object", "list", "scalar", "scalar"] if depth < 3 else ["scalar"]
    kind = draw(st.sampled_from(kinds))
    if kind == "scalar":
        return [Piece(draw(SCALARS), path)]
    keys: list[Any] = draw(st.lists(NAMES, max_size=4, unique=True))
    if kind == "list":
        keys = list(range(len(keys)))
    pieces = [Piece("{" if kind == "object" else "[")]
    for position, key in enumerate(keys):
        pieces.append(Piece(draw(SPACE)))
        if kind == "object":
            name = json.dumps(key, ensure_ascii=draw(st.booleans()))
            pieces.append(Piece(f"{name}{draw(SPACE)}:{draw(SPACE)}"))
        pieces += draw(json_pieces((*path, key), depth + 1))
        pieces.append(Piece(draw(SPACE) + ("," if position < len(keys) - 1 else "")))
    return [*pieces, Piece((draw(SPACE) if not keys else "") + ("}" if kind == "object" else "]"))]


def joined(pieces: list[Piece], changes: Mapping[Any, int] | None = None) -> str:
    """The text, with some scalars replaced."""
    return "".join(str((changes or {}).get(piece.path, piece.text)) for piece in pieces)


@given(json_pieces(), st.data())
def test_named_values_change_and_every_other_character_stays(pieces: list[Piece], data: st.DataObject) -> None:
    paths = [piece.path for piece in pieces if piece.path is not None]
    chosen = data.draw(st.lists(st.sampled_from(paths), unique=True)) if paths else []
    changes: Any = {path: data.draw(st.integers(0, 10**20)) for path in chosen}
    assert edit(joined(pieces), changes) == joined(pieces, changes)


@given(json_pieces())
def test_the_span_of_every_value_holds_its_text(pieces: list[Piece]) -> None:
    text = joined(pieces)
    spans = value_spans(text)
    for piece in pieces:
        if piece.path is not None:
            start, end = spans[piece.path]
            assert text[start:end] == piece.text
    assert spans[()] == (0, len(text))


@given(json_pieces(), st.lists(st.text(), min_size=1, max_size=3, unique=True), st.integers(0, 99))
def test_absent_keys_are_inserted_first_and_nothing_else_changes(pieces: list[Piece], names: list[str], value: int):
    text = joined(pieces)
    before = json.loads(text, parse_constant=str)
    absent = [name for name in names if name not in before]
    edited = edit(text, {(name,): value for name in absent})
    after = json.loads(edited, parse_constant=str)
    assert list(after.items()) == [*((name, value) for name in absent), *before.items()]
    assert edited.endswith(text[1:])


@pytest.mark.parametrize(
    ("text", "path", "expected"),
    [
        ("{}", ("num_experts",), '{"num_experts": 4}'),
        ("{ \n}", ("num_experts",), '{ \n"num_experts": 4 \n}'),
        ('{"a": 1}', ("num_experts",), '{"num_experts": 4,"a": 1}'),
        ('{\n  "a": 1\n}\n', ("num_experts",), '{\n  "num_experts": 4,\n  "a": 1\n}\n'),
        ('{"text_config": {}}', ("text_config", "n"), '{"text_config": {"n": 4}}'),
        ('{"a": {"a": 1}, "n": 2}', ("a", "n"), '{"a": {"n": 4,"a": 1}, "n": 2}'),
        ('{"n": 1, "n": 2}', ("n",), '{"n": 1, "n": 4}'),
        ('{"num\\u005fexperts": 8}', ("num_experts",), '{"num\\u005fexperts": 4}'),
    ],
)
def test_insertions_follow_the_layout_of_their_object(text: str, path: tuple[str, ...], expected: str) -> None:
    assert edit(text, {path: 4}) == expected


REFUSED = {
    "no JSON": ('{"a": 1,}', ("a",), "must be JSON. Got '"),
    "nothing": ("", ("a",), "must be JSON. Got '"),
    "a list": ("[]", ("a",), "must have an object at its top. Got something else instead."),
    "no object": ("{}", ("text_config", "a"), "must have an object 'text_config'. Got none instead."),
    "a number": ('{"n": 5}', ("n", "a"), "must have an object 'n'. Got something else instead."),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_text_that_cannot_hold_the_field_is_refused(case: str) -> None:
    text, path, words = REFUSED[case]
    with pytest.raises(CheckpointError) as caught:
        edit(text, {path: 4})
    assert str(caught.value).startswith(f"config.json: {words}")
    assert str(caught.value).endswith("instead. Download it again.")
