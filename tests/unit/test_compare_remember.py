"""The original remembers what it has computed."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

from dernkit.compare.remember import Memory
from dernkit.testing.checkpoints import tiny_model, tokens


@pytest.fixture
def model() -> Any:
    return tiny_model("mixtral", num_hidden_layers=2)


def passes(model: Any) -> list[int]:
    """Grows whenever the model's layers run."""
    counted: list[int] = []
    model.model.register_forward_hook(lambda *_: counted.append(1))
    return counted


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


def test_the_same_inputs_are_computed_once_and_give_the_same_bits(model: Any) -> None:
    plain, counted = copy.deepcopy(model), passes(model)
    Memory().attach(model)
    for _ in range(3):
        for seed in (0, 1):
            assert torch.equal(logits(model, tokens(2, 9, seed)), logits(plain, tokens(2, 9, seed)))
    assert len(counted) == 2
    logits(model, tokens(1, 9))
    assert len(counted) == 3


def test_a_full_memory_learns_nothing_more(model: Any) -> None:
    counted = passes(model)
    Memory(limit=logits(model, tokens(1, 8)).nbytes).attach(model)
    counted.clear()
    for _ in range(2):
        for seed in (0, 1):
            logits(model, tokens(1, 8, seed))
    assert len(counted) == 3


def test_greedy_generation_is_remembered_and_random_words_are_not(model: Any) -> None:
    ids = tokens(1, 5)
    plain, counted = copy.deepcopy(model), passes(model)
    Memory().attach(model)
    options = {"max_new_tokens": 6, "attention_mask": torch.ones_like(ids)}
    expected = plain.generate(ids, do_sample=False, **options)
    with torch.no_grad():
        first = model.generate(ids, do_sample=False, **options)
        steps = len(counted)
        again = model.generate(ids, do_sample=False, **options)
        assert steps > 0 and len(counted) == steps
        model.generate(ids, do_sample=True, **options)
        assert len(counted) > steps
    assert torch.equal(first, expected) and torch.equal(again, expected)


def test_passes_with_a_cache_or_with_gradients_are_the_model_s_own(model: Any) -> None:
    counted = passes(model)
    Memory().attach(model)
    for _ in range(2):
        with torch.no_grad():
            assert model(input_ids=tokens(1, 4)).past_key_values is not None
        model(input_ids=tokens(1, 4), use_cache=False).logits.sum().backward()
    assert len(counted) == 4


def test_a_model_that_forgot_is_as_it_was_and_goes_when_nobody_needs_it(model: Any) -> None:
    ids, memory = tokens(1, 8), Memory()
    plain = logits(model, ids)
    with memory.attached(model):
        remembered = weakref.ref(model.forward)
        assert torch.equal(logits(model, ids), plain)
    assert "forward" not in vars(model) and "generate" not in vars(model)
    assert torch.equal(logits(model, ids), plain)
    gc.disable()
    try:
        assert remembered() is None
    finally:
        gc.enable()
