"""Text files as evaluators read them: domains of tokens, and windows in which each token is scored once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from dernkit.api import CheckpointError, RecipeError, Subject

CONTEXT = -100
"""Label of a token that is context only."""


@dataclass(frozen=True, slots=True)
class Domain:
    """The tokens of one text file."""

    name: str
    """Stem of the file."""
    ids: Int64[Tensor, " tokens"]
    sizes: Float64[Tensor, " tokens"]
    """Bytes of the text that each token stands for, above 0; they add up to the text's."""
    bytes: int
    """Bytes of the text."""


@dataclass(frozen=True, slots=True)
class Window:
    """Neighbouring tokens of a domain, of which the last ones are scored."""

    domain: str
    name: str
    """``domain:index``."""
    ids: Int64[Tensor, " tokens"]
    labels: Int64[Tensor, " tokens"]
    """The ids; -100 for context, the first token always included."""
    bytes: float
    """Bytes of the scored tokens; the first window's are those of the text's first token too, so that the bytes of all
    windows add up to the text's."""

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return int((self.labels[1:] != CONTEXT).sum())


@dataclass(frozen=True, slots=True)
class Part:
    """Which bytes of each text are read."""

    skip: int = 0
    limit: int | None = None
    """How many, after those that are skipped; None: all."""

    def of(self, text: str) -> str:
        """That part of the text, without the characters that it cuts."""
        stop = None if self.limit is None else self.skip + self.limit
        return text.encode()[self.skip : stop].decode(errors="ignore")


def read_domains(subject: Subject, path: Path, part: Part, evaluator: str) -> Iterator[Domain]:
    """A part of the text file at ``path``, or of every ``*.txt`` of the folder there.

    Raises:
        RecipeError: there is none, or it is no text, or shorter than 2 tokens.
        CheckpointError: the tokenizer gives tokens that the model does not have.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise RecipeError(
            f"{evaluator}.path: must be a text file or a folder of *.txt. Got '{path}' instead. "
            f"Point it at held-out text with --set evaluate.0.path=FILE."
        )
    for file in files:
        text = part.of(_read(file, evaluator))
        ids, sizes = _tokens(subject, text)
        if len(ids) < 2 or not text:
            raise RecipeError(
                f"{evaluator}.path: texts must have at least 2 tokens. Got {len(ids) if text else 0} in '{file}' "
                "instead."
            )
        rows = subject.model.get_input_embeddings().num_embeddings
        if int(ids.max()) >= rows:
            raise CheckpointError(
                f"{subject.path}: the tokenizer must give tokens below {rows}, the model's vocabulary. "
                f"Got {int(ids.max())} instead. Take model and tokenizer from the same download."
            )
        yield Domain(file.stem, ids, sizes, len(text.encode()))


def windows(domain: Domain, length: int, stride: int | None) -> list[Window]:
    """Windows of ``length`` tokens whose starts are ``stride`` apart (by default, and at most, ``length - 1``).

    Each token but the first is scored once: in the first window that reaches it.
    """
    stride = min(stride or length - 1, length - 1)
    found: list[Window] = []
    scored = 1  # the first token has nothing before it
    for start in range(0, len(domain.ids), stride):
        ids = domain.ids[start : start + length]
        labels = ids.clone()
        labels[: scored - start] = CONTEXT
        end = start + len(ids)
        if end > scored:
            size = float(domain.sizes[scored if found else 0 : end].sum())
            found.append(Window(domain.name, f"{domain.name}:{len(found)}", ids, labels, size))
            scored = end
        if end == len(domain.ids):
            break
    return found


def batches(found: Sequence[Window], size: int) -> Iterator[list[Window]]:
    """At most ``size`` neighbouring windows at a time, all of the same length."""
    for at in range(0, len(found), size):
        chunk = found[at : at + size]
        for length in sorted({len(window.ids) for window in chunk}, reverse=True):
            yield [window for window in chunk if len(window.ids) == length]


def stacked(batch: Sequence[Window]) -> Int64[Tensor, "windows tokens"]:
    """The tokens of windows of the same length."""
    return torch.stack([window.ids for window in batch])


def token_bytes(ends: Sequence[int], text: str) -> Float64[Tensor, " tokens"]:
    """Bytes of the text for each token, given the characters after which the tokens end.

    A token stands for the bytes from the end of the one before it to its own end, the last one for the rest of the
    text. Tokens that end at the same character (parts of one, special tokens) share its bytes equally.
    """
    at = torch.tensor([0, *(len(character.encode()) for character in text)]).cumsum(0)
    reached = at[torch.tensor(ends)].cummax(0).values
    reached[reached == reached[-1]] = at[-1]
    reached[reached == 0] = reached[reached > 0][0]
    _, run, counts = torch.unique_consecutive(reached, return_inverse=True, return_counts=True)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)[:-1]])
    added = torch.diff(reached[starts], prepend=torch.zeros(1, dtype=torch.int64))
    return (added.double() / counts)[run]


def _tokens(subject: Subject, text: str) -> tuple[Int64[Tensor, " tokens"], Float64[Tensor, " tokens"]]:
    """Ids, and bytes of each; without a fast tokenizer's offsets, the bytes are spread evenly over the tokens."""
    if getattr(subject.tokenizer, "is_fast", False) and text:
        found = subject.tokenizer(text, verbose=False, return_offsets_mapping=True)
        ids = torch.tensor(found["input_ids"], dtype=torch.int64)
        return ids, token_bytes([end for _, end in found["offset_mapping"]], text)
    ids = torch.tensor(subject.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
    return ids, torch.full((len(ids),), len(text.encode()) / max(len(ids), 1), dtype=torch.float64)


def _read(file: Path, evaluator: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"{evaluator}.path: must be UTF-8 text that can be read. Got '{file}' ({error}) instead."
        ) from None
