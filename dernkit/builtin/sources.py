"""Where calibration tokens come from: a text file, a file of JSON lines, a dataset of the Hugging Face Hub."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, final

import torch
from jaxtyping import Int64
from torch import Tensor

from dernkit.api import RecipeError, hookimpl
from dernkit.kernel.packing import pack, token_pieces

PIECE = 1 << 20
"""Characters that are read and tokenised at a time."""


@final
@dataclass(frozen=True, slots=True)
class TextFile:
    """One text in a UTF-8 file."""

    name: ClassVar[str] = "text-file"
    path: Path
    """The file, relative to the recipe."""

    def tokens(
        self, tokenizer: Any, sequences: int, length: int, rng: torch.Generator
    ) -> Int64[Tensor, "sequences length"]:
        """Windows chosen from the whole text, tokenised in pieces that end with a paragraph where possible."""
        pieces = token_pieces([read_pieces(self.path)], tokenizer)
        return pack(pieces, sequences=sequences, length=length, rng=rng)


@final
@dataclass(frozen=True, slots=True)
class JsonLines:
    """One text per line of a UTF-8 file, in a field of a JSON object."""

    name: ClassVar[str] = "jsonl"
    path: Path
    """The file, relative to the recipe."""
    field: str = "text"
    """The key that holds the text."""

    def tokens(
        self, tokenizer: Any, sequences: int, length: int, rng: torch.Generator
    ) -> Int64[Tensor, "sequences length"]:
        """Windows chosen from all texts, joined by the tokenizer's end-of-sequence token."""
        pieces = token_pieces(([text] for text in self._texts()), tokenizer)
        return pack(pieces, sequences=sequences, length=length, rng=rng)

    def _texts(self) -> Iterator[str]:
        for number, line in enumerate(_lines(self.path), start=1):
            if not line.strip():
                continue
            where = f"{self.path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise RecipeError(f"calibrate.source: {where} must be JSON. Got '{error.msg}' instead.") from None
            if not isinstance(row, dict):
                raise RecipeError(f"calibrate.source: {where} must be an object. Got {type(row).__name__} instead.")
            yield _text(row, self.field, where)


@final
@dataclass(frozen=True, slots=True)
class Dataset:
    """The first texts of a dataset's split, streamed; needs ``pip install 'dernkit[eval]'``."""

    name: ClassVar[str] = "datasets"
    dataset: str
    """Name on the Hugging Face Hub."""
    split: str = "train"
    """Which split to read."""
    field: str = "text"
    """The column that holds the text."""
    config: str | None = None
    """Which configuration to read, for datasets that have several."""

    def tokens(
        self, tokenizer: Any, sequences: int, length: int, rng: torch.Generator
    ) -> Int64[Tensor, "sequences length"]:
        """Windows of the texts at the beginning of the split, as many as are needed."""
        pieces = token_pieces(([text] for text in self._texts()), tokenizer)
        return pack(_until(pieces, sequences * length), sequences=sequences, length=length, rng=rng)

    def _texts(self) -> Iterator[str]:
        try:
            from datasets import load_dataset
        except ImportError:
            raise RecipeError(
                "calibrate.source: 'datasets' needs the package datasets. Got an environment without it instead. "
                "Run pip install 'dernkit[eval]'."
            ) from None
        for number, row in enumerate(self._rows(load_dataset), start=1):
            yield _text(row, self.field, f"dataset {self.dataset}, row {number},")

    def _rows(self, load_dataset: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from load_dataset(self.dataset, self.config, split=self.split, streaming=True)
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            raise RecipeError(
                f"calibrate.source: dataset {self.dataset} must be loadable. Got {reason} instead."
            ) from error


def read_pieces(path: Path) -> Iterator[str]:
    """A text file in pieces of about :data:`PIECE` characters that end with a paragraph, a line, or before a space.

    Raises:
        RecipeError: the file is missing or not UTF-8.
    """
    rest = ""
    for block in _read(path, lambda file: iter(lambda: file.read(PIECE), "")):
        rest += block
        if len(rest) >= PIECE:
            cut = _cut(rest)
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def _cut(text: str) -> int:
    for mark, extra in (("\n\n", 2), ("\n", 1), (" ", 0)):
        found = text.rfind(mark)
        if found > 0:
            return found + extra
    return len(text)


def _lines(path: Path) -> Iterator[str]:
    return _read(path, iter)


def _read(path: Path, blocks: Any) -> Iterator[str]:
    try:
        with open(path, encoding="utf-8") as file:
            yield from blocks(file)
    except UnicodeDecodeError as error:
        found = f"byte 0x{error.object[error.start]:02x}"
        raise RecipeError(f"calibrate.source: {path} must be UTF-8 text. Got {found} instead.") from None
    except FileNotFoundError:
        raise RecipeError(f"calibrate.source: {path} must be a file. Got a path where nothing is instead.") from None
    except OSError as error:
        raise RecipeError(f"calibrate.source: {path} must be readable. Got '{error.strerror}' instead.") from None


def _text(row: dict[str, Any], field: str, where: str) -> str:
    if field not in row:
        found = ", ".join(row) or "no field"
        raise RecipeError(
            f"calibrate.source: {where} must have the field '{field}'. Got {found} instead. Set calibrate.source.field."
        )
    if not isinstance(row[field], str):
        found = type(row[field]).__name__
        raise RecipeError(f"calibrate.source: {where} must hold text in '{field}'. Got {found} instead.")
    return row[field]


def _until(pieces: Iterable[list[int]], enough: int) -> Iterator[list[int]]:
    count = 0
    for piece in pieces:
        yield piece
        count += len(piece)
        if count >= enough:
            return


@hookimpl
def dernkit_sources() -> list[type]:
    """The built-in sources."""
    return [TextFile, JsonLines, Dataset]
