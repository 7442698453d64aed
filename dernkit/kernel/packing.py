"""Text -> token sequences of one length, without padding: what calibration and evaluation run on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from dernkit.errors import RecipeError


class ShortTextError(RecipeError):
    """A text that gives fewer sequences than asked for."""


def token_pieces(documents: Iterable[Iterable[str]], tokenizer: Any) -> Iterator[list[int]]:
    """Token ids of documents joined by the tokenizer's end-of-sequence token, if it has one.

    Args:
        documents: each is an iterable of pieces that follow each other; a piece is tokenised by itself.
        tokenizer: a ``PreTrainedTokenizer``; it adds no special tokens of its own (a window starts mid-text).
    """
    plainly = {"add_special_tokens": False, "truncation": False, "padding": False, "verbose": False}
    separator = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    started = False
    for document in documents:
        opened = False
        for piece in document:
            ids = tokenizer(piece, **plainly)["input_ids"]
            if not ids:
                continue
            if started and not opened:
                yield separator
            started = opened = True
            yield list(ids)


def pack(
    pieces: Iterable[Sequence[int]], *, sequences: int, length: int, rng: torch.Generator
) -> Int64[Tensor, "sequences length"]:
    """``sequences`` windows of ``length`` tokens out of consecutive ones, in the order of the text.

    When there are more windows than asked for, a seeded permutation chooses; the tokens after the last full window are
    left out.

    Raises:
        ShortTextError: there are fewer windows than asked for.
    """
    parts = [torch.tensor(piece, dtype=torch.int32) for piece in pieces]
    tokens = torch.cat(parts) if parts else torch.empty(0, dtype=torch.int32)
    windows = len(tokens) // length
    if windows < 1:
        raise ShortTextError(
            f"calibrate.source: text must give at least one sequence of {length} tokens. "
            f"Got {len(tokens)} tokens instead. Use a longer text or a smaller length."
        )
    if windows < sequences:
        raise ShortTextError(
            f"calibrate.source: text must give {sequences} sequences of {length} tokens. "
            f"Got {windows} instead. Use a longer text or lower sequences to {windows}."
        )
    chosen = torch.randperm(windows, generator=rng)[:sequences].sort().values
    return tokens[: windows * length].view(windows, length)[chosen].to(torch.int64)
