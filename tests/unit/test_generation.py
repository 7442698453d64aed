"""Greedy continuations are those of the model, and compared with the original's as the page says."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dernkit.api import RecipeError, Subject
from dernkit.builtin.generation import Generation, common_prefix, repetitions
from dernkit.testing.checkpoints import tiny_model, tiny_tokenizer
from tests.reference import evaluators as slow

TEXTS = {"calm": "The sea was calm, and we went on.", "law": "No person shall be held to answer."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (path / f"{name}.txt").write_text(text)
    return path


@pytest.fixture(scope="module")
def pair() -> Subject:
    """A model, and the one that it was made from, a little different."""
    original = Subject(tiny_model("mixtral"), tiny_tokenizer(), Path("tiny"))
    model = copy.deepcopy(original.model)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.add_(0.02 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
    return replace(original, model=model, original=lambda: original)


def continuation(subject: Subject, prompt: list[int], count: int) -> list[int]:
    """Each token from a forward pass over all before it."""
    ids = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            ids.append(int(subject.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(prompt) :]


def test_shares_are_those_of_continuations_without_a_cache(pair: Subject, folder: Path) -> None:
    assert pair.original is not None
    generation = Generation(folder, prompts=4, prompt_length=10, new_tokens=12, batch_size=3)
    seen, found = generation.observe(pair), generation.evaluate(pair)
    agreed, repeated, distinct = [], [], []
    for text in TEXTS.values():
        ids = pair.tokenizer(text)["input_ids"]
        for number in range(4):
            start = number * (len(ids) - 9) // 4
            mine, theirs = (continuation(each, ids[start : start + 10], 12) for each in (pair, pair.original()))
            agreed.append(slow.common_prefix(mine, theirs))
            repeated.append(slow.repetition(mine))
            distinct.append(len(set(mine)))
    assert 0 < sum(agreed) < 12 * 8
    for metric, values, of in (("agreement", agreed, 12), ("repetition", repeated, 9), ("distinct", distinct, 12)):
        assert seen[metric].values.tolist() == values
        assert seen[metric].weights.tolist() == [of] * 8
        assert seen[metric].groups == ("calm",) * 4 + ("law",) * 4
        assert seen[metric].documents[3:5] == ("calm:3", "law:0")
        assert found[f"calm/{metric}"] == pytest.approx(sum(values[:4]) / of / 4)
        assert found[f"mean/{metric}"] == pytest.approx(sum(values) / of / 8)
    assert [each.higher_is_better for each in seen.values()] == [True, False, True]


def test_the_original_agrees_with_itself(pair: Subject, folder: Path) -> None:
    assert pair.original is not None
    generation = Generation(folder, prompts=2, prompt_length=10, new_tokens=8)
    found = generation.evaluate(pair.original())
    assert found == generation.evaluate(replace(pair, model=copy.deepcopy(pair.original().model)))
    assert (found["calm/agreement"], found["mean/agreement"]) == (1, 1)


def test_a_model_that_says_the_same_again_and_again_is_seen_to_repeat(pair: Subject, folder: Path) -> None:
    def model(input_ids: Tensor, past_key_values: Any, use_cache: bool) -> Any:
        following = 4 + (input_ids + 2) % 5
        return SimpleNamespace(logits=torch.nn.functional.one_hot(following, 96).float(), past_key_values=None)

    model.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=96)  # type: ignore[attr-defined]
    model.device = "cpu"  # type: ignore[attr-defined]
    found = Generation(folder, new_tokens=20, prompts=1, prompt_length=3).evaluate(replace(pair, model=model))
    assert found["mean/distinct"] == 5 / 20
    assert found["mean/repetition"] == (17 - 5) / 17


def test_texts_that_are_too_short_are_refused(pair: Subject, folder: Path) -> None:
    size = len(TEXTS["calm"])
    with pytest.raises(RecipeError) as caught:
        Generation(folder, prompts=8, prompt_length=30).evaluate(pair)
    assert str(caught.value) == (
        f"generation.path: texts must have at least 37 tokens for 8 prompts of 30. Got {size} in 'calm' instead. "
        "Ask for fewer or shorter ones."
    )
    whole = Generation(folder / "calm.txt", prompts=4, prompt_length=size - 3, new_tokens=4).observe(pair)
    assert whole["agreement"].documents == ("calm:0", "calm:1", "calm:2", "calm:3")


@given(first=st.lists(st.integers(0, 2), max_size=20), data=st.data())
def test_repetitions_and_common_prefixes_are_counted(first: list[int], data: st.DataObject) -> None:
    assert repetitions(first) == slow.repetition(first)
    second = data.draw(st.lists(st.integers(0, 2), min_size=len(first), max_size=len(first)))
    assert common_prefix(first, second) == slow.common_prefix(first, second)
