"""Calibration without data: the model writes its own text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Int64
from torch import Tensor

from dernkit.api import RecipeError, Source, Writer, hookimpl
from dernkit.kernel import calls
from dernkit.kernel.packing import ShortTextError


@final
@dataclass(frozen=True)
class SelfGenerated:
    """Text that the model samples itself, from the begin-of-text token on: it covers what the model knows.

    An end-of-text token does not end a sequence: what follows is another text. A part of the sequences can come from a
    text of yours.
    """

    name: ClassVar[str] = "self-generated"

    temperature: Annotated[float, Interval(gt=0, le=100)] = 1.0
    """What logits are divided by before a token is drawn: below 1 more probable text, above 1 more varied."""
    prompt: str = ""
    """What every sequence begins with, after the begin-of-text token."""
    batch_size: Annotated[int, Interval(ge=1, le=65_536)] = 32
    """Sequences that are written at a time. A model that is read layer by layer is read once for each token of a batch:
    take as many as memory allows, and short ones."""
    text: Source | None = None
    """Where the other sequences come from."""
    text_share: Annotated[float, Interval(ge=0, le=1)] = 0.5
    """Share of the sequences that come from `text`, if there is one; they are spread evenly among the others."""

    def tokens(
        self, tokenizer: Any, sequences: int, length: int, rng: torch.Generator
    ) -> Int64[Tensor, "sequences length"]:
        """Refused: without the model there is nobody to write."""
        raise RecipeError(
            f"calibrate.source: '{self.name}' must be given the model. Got a tokenizer alone instead. "
            "Use it in a recipe, or name a text."
        )

    def write(
        self, model: Writer, tokenizer: Any, sequences: int, length: int, rng: torch.Generator
    ) -> Int64[Tensor, "sequences length"]:
        """Sampled sequences, and those of the text."""
        copied = 0 if self.text is None else round(self.text_share * sequences)
        found = torch.empty(sequences, length, dtype=torch.int64)
        is_copied = torch.zeros(sequences, dtype=torch.bool)
        if self.text is not None and copied:
            is_copied[torch.arange(copied) * sequences // copied] = True
            found[is_copied] = self._copied(self.text, tokenizer, copied, sequences, length, rng)
        if copied < sequences:
            begin = torch.tensor(self._beginning(tokenizer, length)).expand(sequences - copied, -1)
            parts = [model.continued(part, length, self._drawn(rng)) for part in begin.split(self.batch_size)]
            found[~is_copied] = torch.cat(parts)
        return found

    def _copied(
        self, text: Source, tokenizer: Any, copied: int, sequences: int, length: int, rng: torch.Generator
    ) -> Int64[Tensor, "copied length"]:
        try:
            return calls.tokens(text, tokenizer, copied, length, rng)
        except ShortTextError as error:
            share = f"They are the part, calibrate.source.text_share = {self.text_share:g}, of {sequences}"
            raise ShortTextError(f"{error} {share} calibrate.sequences.") from None

    def _beginning(self, tokenizer: Any, length: int) -> list[int]:
        """Token ids before the first sampled one."""
        starts = [each for each in (tokenizer.bos_token_id, tokenizer.eos_token_id) if each is not None][:1]
        begin = starts + list(tokenizer(self.prompt, add_special_tokens=False)["input_ids"])
        if not begin:
            raise RecipeError(
                "calibrate.source: the tokenizer must have a begin-of-text or end-of-text token to begin with. "
                "Got one with neither instead. Set calibrate.source.prompt."
            )
        if len(begin) >= length:
            raise RecipeError(
                f"calibrate.source: the prompt must leave room in sequences of {length} tokens. "
                f"Got {len(begin)} tokens with the begin-of-text token instead. Shorten it, or raise calibrate.length."
            )
        return begin

    def _drawn(self, rng: torch.Generator) -> Callable[[Tensor], Tensor]:
        def choose(logits: Tensor) -> Tensor:
            chances = (logits.to(torch.float64) / self.temperature).softmax(dim=-1)
            return torch.multinomial(chances, 1, generator=rng)[:, 0]

        return choose


@hookimpl
def dernkit_sources() -> list[type]:
    """The source that needs no data."""
    return [SelfGenerated]
