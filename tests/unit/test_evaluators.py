"""Perplexity is what its formula says, and lm-eval runs on local tasks without a network."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from dernkit.api import CheckpointError, RecipeError, Subject
from dernkit.builtin.evaluators import Fidelity, Perplexity
from dernkit.testing.checkpoints import VOCABULARY, tiny_model
from tests.unit.workbench import TEXT, save_tokenizer


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(folder)
    return Subject(tiny_model("qwen2_moe", num_hidden_layers=2), AutoTokenizer.from_pretrained(folder), folder)


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "calm.txt").write_text(TEXT)
    return tmp_path / "calm.txt"


def nats(model: Any, ids: Tensor) -> Tensor:
    """The loss of every token but the first in one forward pass."""
    with torch.no_grad():
        logits = model(input_ids=ids[None]).logits[0]
    return cross_entropy(logits[:-1].double(), ids[1:], reduction="none")


def test_a_text_within_one_window_is_scored_in_one_forward_pass(subject: Subject, text: Path) -> None:
    ids = torch.tensor(subject.tokenizer(TEXT)["input_ids"])
    losses = nats(subject.model, ids)
    found = Perplexity(text, length=4096).evaluate(subject)
    assert found["calm/tokens"] == len(losses) == 199
    assert found["calm/loss"] == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found["calm/perplexity"] == pytest.approx(math.exp(losses.mean()), rel=1e-5)
    bits = float(losses.sum()) / math.log(2) / len(TEXT.encode())
    assert found["calm/bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert (found["mean/loss"], found["mean/perplexity"]) == (found["calm/loss"], found["calm/perplexity"])


def test_a_limit_reads_the_beginning_of_a_text_in_whole_characters(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(f"{TEXT[:99]}é{TEXT}", encoding="utf-8")  # byte 100 is inside the é
    (tmp_path / "cut.txt").write_text(TEXT[:99], encoding="utf-8")
    long = Perplexity(tmp_path / "long.txt", limit=100).evaluate(subject)
    cut = Perplexity(tmp_path / "cut.txt").evaluate(subject)
    assert list(long.values()) == list(cut.values())


@pytest.mark.parametrize(("length", "stride"), [(16, None), (16, 5), (16, 15), (16, 40), (7, 1)])
def test_every_token_is_scored_in_the_first_window_that_reaches_it(
    subject: Subject, text: Path, length: int, stride: int | None
) -> None:
    ids = torch.tensor(subject.tokenizer(TEXT)["input_ids"])
    step, losses = min(stride or length - 1, length - 1), {}
    for start in range(0, len(ids), step):
        for offset, loss in enumerate(nats(subject.model, ids[start : start + length])):
            losses.setdefault(start + offset + 1, loss)
    assert len(losses) == len(ids) - 1
    found = Perplexity(text, length=length, stride=stride, batch_size=3).evaluate(subject)
    assert found["calm/tokens"] == len(ids) - 1
    assert found["calm/loss"] == pytest.approx(float(sum(losses.values())) / len(losses), rel=1e-5)


class Counting:
    """A model of the sequence 0, 1, 2, …: it predicts token t with the probability exp(-t / 64)."""

    device = "cpu"

    def get_input_embeddings(self) -> Any:
        return SimpleNamespace(num_embeddings=64)

    def __call__(self, input_ids: Tensor, use_cache: bool) -> Any:
        following = input_ids + 1
        share = torch.exp(-following.double() / 64)
        logits = torch.full((*input_ids.shape, 65), -math.inf, dtype=torch.float64)
        logits[..., 64] = torch.log1p(-share)
        return SimpleNamespace(logits=logits.scatter(2, following[..., None], share.log()[..., None]))


@settings(deadline=None)
@given(count=st.integers(2, 60), length=st.integers(2, 20), stride=st.integers(1, 25), batch=st.integers(1, 5))
def test_with_any_stride_every_token_but_the_first_is_scored_once(
    tmp_path_factory: pytest.TempPathFactory, count: int, length: int, stride: int, batch: int
) -> None:
    file = tmp_path_factory.getbasetemp() / "counting.txt"
    file.write_text("x")
    counting = Subject(Counting(), lambda text, verbose: {"input_ids": list(range(count))}, file.parent)
    found = Perplexity(file, length=length, stride=stride, batch_size=batch).evaluate(counting)
    assert found["counting/tokens"] == count - 1
    assert found["counting/loss"] == pytest.approx(sum(range(1, count)) / 64 / (count - 1), rel=1e-5)


def test_a_folder_gives_metrics_by_domain_and_their_mean(subject: Subject, tmp_path: Path) -> None:
    for name, words in (("law", TEXT[:200]), ("code", TEXT[200:300])):
        (tmp_path / f"{name}.txt").write_text(words)
    (tmp_path / "notes.md").write_text("not read")
    found = Perplexity(tmp_path).evaluate(subject)
    apart = {name: Perplexity(tmp_path / f"{name}.txt").evaluate(subject) for name in ("law", "code")}
    mean = (apart["law"]["law/loss"] + apart["code"]["code/loss"]) / 2
    domains = {key: value for result in apart.values() for key, value in result.items() if "mean" not in key}
    assert found == {**domains, "mean/loss": mean, "mean/perplexity": math.exp(mean)}


def test_a_load_balancing_loss_is_not_counted(subject: Subject, text: Path) -> None:
    plain = Perplexity(text).evaluate(subject)
    model = tiny_model("qwen2_moe", num_hidden_layers=2, output_router_logits=True, router_aux_loss_coef=10.0)
    assert Perplexity(text).evaluate(Subject(model, subject.tokenizer, subject.path)) == plain


def test_a_hopeless_model_has_an_infinite_perplexity(text: Path) -> None:
    def model(input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.full((*input_ids.shape, 96), 0.0).index_fill(2, torch.tensor([95]), 1e4))

    model.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=VOCABULARY)  # type: ignore[attr-defined]
    model.device = "cpu"  # type: ignore[attr-defined]
    found = Perplexity(text).evaluate(Subject(model, lambda text, verbose: {"input_ids": [1] * 9}, text))
    assert (found["calm/loss"], found["calm/perplexity"]) == (1e4, math.inf)


REFUSED = {
    "nothing there": ("none.txt", "must be a text file or a folder of *.txt. Got '{path}' instead."),
    "a folder without texts": ("empty", "must be a text file or a folder of *.txt. Got '{path}' instead."),
    "an empty text": ("nothing.txt", "texts must have at least 2 tokens. Got 0 in '{path}' instead."),
    "one token": ("short.txt", "texts must have at least 2 tokens. Got 1 in '{path}' instead."),
    "not text": ("binary.txt", "must be UTF-8 text that can be read. Got '{path}' ('utf-8' codec"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_texts_that_cannot_be_scored_are_refused(subject: Subject, tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("w1")
    (tmp_path / "nothing.txt").write_text("")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe")
    name, words = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        Perplexity(tmp_path / name).evaluate(subject)
    assert str(caught.value).startswith(f"perplexity.path: {words.format(path=tmp_path / name)}")


def test_a_model_that_gives_no_numbers_is_refused(subject: Subject, text: Path) -> None:
    def model(input_ids: Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.full((*input_ids.shape, VOCABULARY), math.nan))

    model.get_input_embeddings = lambda: SimpleNamespace(num_embeddings=VOCABULARY)  # type: ignore[attr-defined]
    model.device = "cpu"  # type: ignore[attr-defined]
    broken = replace(subject, model=model, original=lambda: subject)
    for evaluator, what in ((Perplexity(text), "loss"), (Fidelity(text), "divergence")):
        with pytest.raises(CheckpointError) as caught:
            evaluator.observe(broken)
        assert str(caught.value) == (
            f"{subject.path}: the model must give finite numbers. Got a {what} of nan on window 'calm:0' instead. "
            "Look at its weights, or keep them in a wider dtype."
        )


def test_what_is_observed_adds_up_to_what_is_evaluated(subject: Subject, tmp_path: Path) -> None:
    for name, words in (("law", TEXT[:300]), ("code", TEXT[300:390])):
        (tmp_path / f"{name}.txt").write_text(words)
    perplexity = Perplexity(tmp_path, length=16)
    found, seen = perplexity.evaluate(subject), perplexity.observe(subject)
    for domain in ("law", "code"):
        assert seen["loss"].by_group()[domain] == pytest.approx(found[f"{domain}/loss"], rel=1e-12)
        assert seen["bits_per_byte"].by_group()[domain] == pytest.approx(found[f"{domain}/bits_per_byte"], rel=1e-12)
    assert seen["loss"].mean() == pytest.approx(found["mean/loss"], rel=1e-12)
    assert seen["bits_per_byte"].weights.sum() == pytest.approx(390, rel=1e-12)


def test_without_a_fast_tokenizer_bytes_are_spread_over_the_tokens(subject: Subject, text: Path) -> None:
    def slow(words: str, verbose: bool) -> Any:
        return subject.tokenizer(words, verbose=verbose)

    plain, spread = (
        Perplexity(text, length=16).observe(replace(subject, tokenizer=tokenizer))
        for tokenizer in (subject.tokenizer, slow)
    )
    assert spread["loss"].values.tolist() == plain["loss"].values.tolist()
    size, tokens = len(TEXT.encode()), len(subject.tokenizer(TEXT)["input_ids"])
    scored = spread["loss"].weights.copy()
    scored[0] += 1  # the first token is not scored, but its bytes are the first window's
    assert spread["bits_per_byte"].weights == pytest.approx(scored * size / tokens, rel=1e-12)
    assert plain["bits_per_byte"].weights.sum() == pytest.approx(size, rel=1e-12)


def test_fidelity_of_the_original_and_of_the_same_weights_is_perfect(subject: Subject, text: Path) -> None:
    fidelity = Fidelity(text, length=16)
    itself = fidelity.observe(subject)
    for twin in (subject, replace(subject, model=copy.deepcopy(subject.model))):
        seen = fidelity.observe(replace(subject, original=lambda: twin))
        for metric, exact in (("kl", 0), ("top1", 1)):
            assert seen[metric].by_group() == {"calm": exact}
            assert seen[metric].documents == itself[metric].documents
            assert seen[metric].values.tolist() == itself[metric].values.tolist()
    assert fidelity.evaluate(subject) == {"calm/kl": 0, "calm/top1": 1, "mean/kl": 0, "mean/top1": 1}


def test_fidelity_is_the_nearer_to_perfect_the_nearer_the_weights_are(subject: Subject, tmp_path: Path) -> None:
    for name, words in (("law", TEXT[:300]), ("code", TEXT[300:390])):
        (tmp_path / f"{name}.txt").write_text(words)
    found = []
    for noise in (0.001, 0.05, 0.5):
        model = copy.deepcopy(subject.model)
        with torch.no_grad():
            for tensor in model.parameters():
                tensor.add_(noise * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(0)))
        found.append(Fidelity(tmp_path, length=64).evaluate(replace(subject, model=model, original=lambda: subject)))
    for name in ("law", "code", "mean"):
        assert 0 < found[0][f"{name}/kl"] < found[1][f"{name}/kl"] < found[2][f"{name}/kl"]
        assert 1 >= found[0][f"{name}/top1"] > found[1][f"{name}/top1"] > found[2][f"{name}/top1"]


def test_an_original_with_another_vocabulary_is_refused(subject: Subject, text: Path) -> None:
    other = Subject(tiny_model("qwen2_moe", num_hidden_layers=2, vocab_size=99), subject.tokenizer, text)
    with pytest.raises(CheckpointError) as caught:
        Fidelity(text).evaluate(replace(subject, original=lambda: other))
    assert str(caught.value) == (
        f"{subject.path}: must have the original's vocabulary of 99 tokens. Got {VOCABULARY} instead. "
        "Compare it with the model that it was made from."
    )


def test_a_skipped_beginning_is_not_read(subject: Subject, tmp_path: Path) -> None:
    """Skipping and limiting is measuring the piece in between, which no character is cut in."""
    text = "é" + "abcdefghij " * 60
    (tmp_path / "whole.txt").write_text(text, encoding="utf-8")
    (tmp_path / "piece").mkdir()
    (tmp_path / "piece" / "whole.txt").write_text(text.encode()[13:213].decode(), encoding="utf-8")
    piece = Perplexity(tmp_path / "piece", length=16).evaluate(subject)
    assert Perplexity(tmp_path / "whole.txt", length=16, skip=13, limit=200).evaluate(subject) == piece
    assert Perplexity(tmp_path / "whole.txt", length=16, skip=1).evaluate(subject)["whole/tokens"] > 0
