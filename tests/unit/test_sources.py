"""Calibration tokens: packing, choosing, and what the sources say when they cannot."""

import json
import sys
from itertools import chain
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from dernkit.api import RecipeError, Source
from dernkit.builtin import sources
from dernkit.builtin.sources import Dataset, JsonLines, TextFile, read_pieces
from dernkit.kernel.packing import pack, token_pieces

EOS = 1000


class Characters:
    """A tokenizer whose tokens are the characters' codes."""

    def __init__(self, eos_token_id: int | None = EOS) -> None:
        self.eos_token_id = eos_token_id

    def __call__(self, text: str, *, add_special_tokens: bool, truncation: bool, padding: bool, verbose: bool) -> Any:
        assert not (add_special_tokens or truncation or padding or verbose)
        return {"input_ids": [ord(letter) for letter in text]}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(source: Source, sequences: int, length: int, *, seed: int = 0, tokenizer: Any = None) -> list[list[int]]:
    return source.tokens(tokenizer or Characters(), sequences, length, rng(seed)).tolist()


def codes(text: str) -> list[int]:
    return [ord(letter) for letter in text]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "t.txt"
    path.write_text("abcdefghij" * 100 + "xyz")
    return path


def refusal(source: Source, sequences: int = 1, length: int = 2) -> str:
    with pytest.raises(RecipeError) as caught:
        tokens(source, sequences, length)
    return str(caught.value)


def test_a_text_is_cut_into_windows_and_the_rest_left_out(text: Path) -> None:
    found = tokens(TextFile(text), 10, 100)
    assert found == [codes("abcdefghij" * 10)] * 10


def test_windows_are_int64_and_chosen_by_the_seed_in_the_order_of_the_text() -> None:
    windows = [pack([range(1000)], sequences=5, length=10, rng=rng(seed)) for seed in (3, 3, 4)]
    assert windows[0].dtype == torch.int64
    assert torch.equal(windows[0], windows[1])
    assert not torch.equal(windows[0], windows[2])
    starts = windows[0][:, 0].tolist()
    assert starts == sorted(starts) != list(range(0, 50, 10))
    assert all(start % 10 == 0 for start in starts)


def test_documents_are_joined_by_the_end_of_sequence_token() -> None:
    documents = [["a", "b"], [""], ["c"], ["", "d"]]
    assert list(chain(*token_pieces(documents, Characters()))) == [97, 98, EOS, 99, EOS, 100]
    assert list(chain(*token_pieces(documents, Characters(eos_token_id=None)))) == [97, 98, 99, 100]


def test_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps({"body": "ab"}) + "\n\n" + json.dumps({"body": "\u00e9"}) + "\n")
    assert tokens(JsonLines(path, field="body"), 1, 4) == [[97, 98, EOS, 233]]


def test_a_large_text_is_read_in_pieces_that_end_with_a_paragraph(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(sources, "PIECE", 20)
    path = tmp_path / "t.txt"
    for written, expected in (
        ("one\n\ntwo\n\nthree four five\n\nsix", ["one\n\ntwo\n\n", "three four five\n\n", "six"]),
        ("one two\nthree four five six", ["one two\n", "three four five six"]),
        ("one two three four five six", ["one two three four", " five six"]),
        ("x" * 50, ["x" * 20, "x" * 20, "x" * 10]),
    ):
        path.write_text(written)
        pieces = list(read_pieces(path))
        assert "".join(pieces) == written
        assert pieces == expected


def test_a_text_that_is_too_short_says_how_long_it_is(text: Path) -> None:
    assert refusal(TextFile(text), 1, 2048) == (
        "calibrate.source: text must give at least one sequence of 2048 tokens. Got 1003 tokens instead. "
        "Use a longer text or a smaller length."
    )
    assert refusal(TextFile(text), 11, 100) == (
        "calibrate.source: text must give 11 sequences of 100 tokens. Got 10 instead. "
        "Use a longer text or lower sequences to 10."
    )


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing, binary = tmp_path / "none.txt", tmp_path / "b.txt"
    binary.write_bytes(b"ab\xff")
    for source in (TextFile, JsonLines):
        assert refusal(source(missing)) == (
            f"calibrate.source: {missing} must be a file. Got a path where nothing is instead."
        )
        assert refusal(source(binary)) == f"calibrate.source: {binary} must be UTF-8 text. Got byte 0xff instead."
        assert refusal(source(tmp_path)).endswith("must be readable. Got 'Is a directory' instead.")


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"text": ', "must be JSON. Got 'Expecting value' instead."),
        ("[1]", "must be an object. Got list instead."),
        ('{"body": "a", "id": 1}', "must have the field 'text'. Got body, id instead. Set calibrate.source.field."),
        ('{"text": 5}', "must hold text in 'text'. Got int instead."),
    ],
)
def test_a_bad_json_line_is_named_by_its_number(tmp_path: Path, line: str, sentence: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text('{"text": "fine"}\n' + line + "\n")
    assert refusal(JsonLines(path)) == f"calibrate.source: {path}:2 {sentence}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A stand-in for the package datasets; collects what is asked for and how many rows are read."""
    seen: list[Any] = []

    def load_dataset(dataset: str, config: str | None, *, split: str, streaming: bool) -> Any:
        seen.append((dataset, config, split, streaming))
        if dataset == "offline":
            raise ConnectionError("no route\nto the hub.")
        return ({"text": "abcd", "row": seen.append(row)} for row in range(1000))

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return seen


def test_a_dataset_is_streamed_no_further_than_needed(hub: list[Any]) -> None:
    assert tokens(Dataset("c4", config="en"), 3, 5) == [[*codes("abcd"), EOS]] * 3
    assert hub == [("c4", "en", "train", True), 0, 1, 2, 3]


def test_a_dataset_says_what_is_wrong(hub: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal(Dataset("offline")) == (
        "calibrate.source: dataset offline must be loadable. Got ConnectionError: no route to the hub instead."
    )
    assert refusal(Dataset("c4", field="body")).startswith(
        "calibrate.source: dataset c4, row 1, must have the field 'body'. Got text, row instead."
    )
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert refusal(Dataset("c4")) == (
        "calibrate.source: 'datasets' needs the package datasets. Got an environment without it instead. "
        "Run pip install 'dernkit[eval]'."
    )


def test_a_real_tokenizer_is_used_as_it_is_without_special_tokens_or_warnings(
    text: Path, recwarn: Any, caplog: Any
) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate("abcdefghijxyz")} | {"<s>": 13, "</s>": 14}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 13)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", model_max_length=8)
    assert tokenizer("ab")["input_ids"] == [13, 0, 1]
    assert tokens(TextFile(text), 1, 1003, tokenizer=tokenizer) == [[*list(range(10)) * 100, 10, 11, 12]]
    assert not recwarn.list and not caplog.records
