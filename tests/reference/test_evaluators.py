"""What the text evaluators observe against slow loops over tokens."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dernkit.api import Subject
from dernkit.builtin.evaluators import Fidelity, Perplexity, divergence
from dernkit.builtin.texts import token_bytes
from dernkit.testing.checkpoints import tiny_model, tiny_tokenizer
from tests.reference import evaluators as slow

TEXTS = {"calm": "The sea was calm; she said: go é on, 3 ships.", "law": "No person shall be held to answer. " * 2}
WINDOWS = [(16, None), (16, 5), (7, 1), (200, None), (2, None)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (path / f"{name}.txt").write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pair() -> Subject:
    """A model, and another one of the same kind as its original."""
    first, second = (Subject(tiny_model("mixtral", seed=seed), tiny_tokenizer(), Path("tiny")) for seed in (0, 1))
    return Subject(first.model, first.tokenizer, first.path, lambda: second)


def logits(subject: Subject, ids: list[int]) -> list[list[float]]:
    with torch.no_grad():
        return subject.model(input_ids=torch.tensor([ids])).logits[0].double().tolist()


def places(subject: Subject, length: int, stride: int | None) -> list[tuple[str, list[int], int, int]]:
    """Domain, tokens, index and first scored token (counted from the window's start) of every window."""
    found = []
    for name, text in TEXTS.items():
        ids = subject.tokenizer(text)["input_ids"]
        step = min(stride or length - 1, length - 1)
        for index, (start, first, end) in enumerate(slow.window_places(len(ids), length, step)):
            found.append((name, ids[start:end], index, first - start))
    return found


@pytest.mark.parametrize(("length", "stride"), WINDOWS)
def test_bits_per_byte_and_loss_of_every_window(pair: Subject, folder: Path, length: int, stride: int | None) -> None:
    seen = Perplexity(folder, length=length, stride=stride, batch_size=3).observe(pair)
    expected = places(pair, length, stride)
    for metric in ("bits_per_byte", "loss"):
        assert list(seen[metric].documents) == [f"{name}:{index}" for name, _, index, _ in expected]
        assert list(seen[metric].groups) == [name for name, *_ in expected]
    nats = [slow.nats(logits(pair, ids), ids, first) for _, ids, _, first in expected]
    np.testing.assert_allclose(seen["loss"].values, nats, rtol=1e-5)
    np.testing.assert_allclose(seen["bits_per_byte"].values, np.array(nats) / math.log(2), rtol=1e-5)
    assert seen["loss"].weights.tolist() == [len(ids) - first for _, ids, _, first in expected]
    for name, text in TEXTS.items():  # a token is a character here
        mine = [i for i, (domain, *_) in enumerate(expected) if domain == name]
        ends = np.cumsum(seen["loss"].weights[mine]).astype(int) + 1
        reached = [len(text[:end].encode()) for end in ends]
        np.testing.assert_allclose(np.cumsum(seen["bits_per_byte"].weights[mine]), reached, rtol=1e-12)


@pytest.mark.parametrize(("length", "stride"), WINDOWS)
def test_divergence_and_agreement_of_every_window(pair: Subject, folder: Path, length: int, stride: int | None) -> None:
    assert pair.original is not None
    seen = Fidelity(folder, length=length, stride=stride, batch_size=3).observe(pair)
    expected = places(pair, length, stride)
    outputs = [(logits(pair.original(), ids), logits(pair, ids), first) for _, ids, _, first in expected]
    np.testing.assert_allclose(seen["kl"].values, [slow.kl(*each) for each in outputs], rtol=1e-6)
    assert seen["top1"].values.tolist() == [slow.agreement(*each) for each in outputs]
    for metric in ("kl", "top1"):
        assert seen[metric].weights.tolist() == [len(ids) - first for _, ids, _, first in expected]
    assert (seen["kl"].higher_is_better, seen["top1"].higher_is_better) == (False, True)


def test_divergence_is_that_of_the_formula_where_it_is_tiny_huge_or_impossible(monkeypatch: Any) -> None:
    monkeypatch.setattr("dernkit.builtin.evaluators.ENTRIES", 40)  # three tokens at a time
    rng = torch.Generator().manual_seed(0)
    before = torch.randn(9, 13, generator=rng) * 5
    labels = torch.tensor([-100, -100, 1, 2, 3, 4, 5, 6, 7])
    for scale in (0.0, 1e-4, 1.0, 300.0):
        after = before + scale * torch.randn(9, 13, generator=rng)
        before[4, 2] = after[4, 2] = -math.inf
        kl, same = divergence(before, after, labels)
        rows = before.double().tolist(), after.double().tolist()
        assert kl == pytest.approx(slow.kl(*rows, 2), rel=1e-9, abs=1e-15)
        assert same == slow.agreement(*rows, 2)
    assert divergence(before, before, labels) == (0.0, 7)


@given(text=st.text("aé𝄞 ", min_size=1, max_size=20), data=st.data())
def test_bytes_of_tokens_are_above_0_and_add_up_to_the_texts(text: str, data: st.DataObject) -> None:
    ends = data.draw(st.lists(st.integers(0, len(text)), min_size=1, max_size=30).filter(any))
    found = token_bytes(ends, text)
    assert bool((found > 0).all())
    assert float(found.sum()) == pytest.approx(len(text.encode()), rel=1e-12)
    np.testing.assert_allclose(found, slow.token_bytes(ends, text), rtol=1e-12)
