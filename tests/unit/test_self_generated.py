"""Text that a model writes for its own calibration: how it begins, how it is drawn, and what is mixed with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dernkit.api import RecipeError
from dernkit.builtin.self_generated import SelfGenerated
from dernkit.builtin.sources import TextFile

SIZE = 128


class Letters:
    """A tokenizer whose tokens are the characters' codes."""

    def __init__(self, bos: int | None = 1, eos: int | None = 2) -> None:
        self.bos_token_id, self.eos_token_id = bos, eos

    def __call__(self, text: str, **options: Any) -> Any:
        return {"input_ids": [ord(letter) for letter in text]}


class Next:
    """A model that follows each token by the next one, with a log-odds of ``sure``; it counts its batches."""

    def __init__(self, sure: float = 1000.0) -> None:
        self.sure, self.batches = sure, []

    def continued(self, prompts: Tensor, length: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
        self.batches.append(len(prompts))
        while prompts.shape[1] < length:
            logits = self.sure * torch.nn.functional.one_hot((prompts[:, -1] + 1) % SIZE, SIZE).float()
            prompts = torch.cat([prompts, choose(logits)[:, None]], dim=1)
        return prompts


def written(source: SelfGenerated, model: Next, sequences: int = 5, length: int = 6, **tokenizer: Any) -> list:
    rng = torch.Generator().manual_seed(0)
    return source.write(model, Letters(**tokenizer), sequences, length, rng).tolist()


def test_sequences_begin_with_the_begin_of_text_token_and_the_prompt() -> None:
    assert written(SelfGenerated(), Next()) == [[1, 2, 3, 4, 5, 6]] * 5
    assert written(SelfGenerated(prompt="AB"), Next())[0] == [1, 65, 66, 67, 68, 69]
    assert written(SelfGenerated(), Next(), bos=None)[0] == [2, 3, 4, 5, 6, 7]
    assert written(SelfGenerated(prompt="A"), Next(), bos=None, eos=None)[0] == [65, 66, 67, 68, 69, 70]


def test_batches_are_no_larger_than_asked_for() -> None:
    model = Next()
    written(SelfGenerated(batch_size=2), model)
    assert model.batches == [2, 2, 1]


def test_temperature_divides_the_logits() -> None:
    """The next token has odds of e to the power of sure / temperature against each of the others."""
    for temperature in (0.5, 1.0, 2.0):
        model = Next(sure=5.0)
        found = torch.tensor(written(SelfGenerated(temperature=temperature), model, 400, 11))
        share = float((found[:, 1:] == (found[:, :-1] + 1) % SIZE).float().mean())
        odds = torch.exp(torch.tensor(5.0 / temperature))
        assert share == pytest.approx(float(odds / (odds + SIZE - 1)), abs=0.03)


def test_sequences_of_a_text_are_spread_evenly_among_the_others(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 100)
    text = TextFile(tmp_path / "t.txt")
    found = written(SelfGenerated(text=text, text_share=0.4), Next(), 10)
    copied = [number for number, row in enumerate(found) if row == [ord("x")] * 6]
    assert copied == [0, 2, 5, 7] and all(found[number][0] == 1 for number in {*range(10)} - {*copied})
    model = Next()
    assert written(SelfGenerated(text=text, text_share=1.0), model) == [[ord("x")] * 6] * 5 and not model.batches


def test_a_text_that_is_too_short_for_its_share_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("x" * 20)
    with pytest.raises(RecipeError) as caught:
        written(SelfGenerated(text=TextFile(tmp_path / "t.txt"), text_share=0.4), Next(), 10)
    assert str(caught.value) == (
        "calibrate.source: text must give 4 sequences of 6 tokens. Got 3 instead. Use a longer text or lower sequences "
        "to 3. They are the part, calibrate.source.text_share = 0.4, of 10 calibrate.sequences."
    )


@pytest.mark.parametrize(
    ("source", "tokenizer", "sentence"),
    [
        (SelfGenerated(), {"bos": None, "eos": None}, "must have a begin-of-text or end-of-text token"),
        (SelfGenerated(prompt="ABCDE"), {}, "must leave room in sequences of 6 tokens. Got 6 tokens"),
    ],
)
def test_what_cannot_begin_is_refused(source: SelfGenerated, tokenizer: dict[str, None], sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        written(source, Next(), **tokenizer)


def test_without_a_model_nothing_is_written() -> None:
    with pytest.raises(RecipeError, match="must be given the model"):
        SelfGenerated().tokens(Letters(), 2, 4, torch.Generator())
