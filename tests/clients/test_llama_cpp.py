"""llama.cpp, through its own converter to GGUF, continues texts with the same tokens."""

from __future__ import annotations

import pytest
from transformers import AutoTokenizer

from tests.clients.bench import BUNDLED, SHIPPED, TESTBEDS, Bench, greedy5
from tests.clients.client import Client
from tests.clients.record import Record

pytestmark = pytest.mark.clients
MODELS = ("mixtral", "qwen3_moe", "olmoe", BUNDLED)
TEXTS = ("jane-austen.txt", "rust-books.txt", "sqlite3-doc.txt")
COUNT = 16


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """The first 24 tokens of some held-out texts."""
    tokenizer = AutoTokenizer.from_pretrained(TESTBEDS / "mixtral/model")
    texts = [(TESTBEDS / "heldout" / name).read_text(encoding="utf-8")[:400] for name in TEXTS]
    return [tokenizer(text)["input_ids"][:24] for text in texts]


@pytest.mark.parametrize("kind", ["source", *SHIPPED])
@pytest.mark.parametrize("model", MODELS)
def test_greedy_tokens_are_those_of_transformers(
    llama_cpp: Client, bench: Bench, record: Record, prompts: list[list[int]], model: str, kind: str
) -> None:
    found = llama_cpp.call("greedy", file=str(bench.gguf(model, kind)), prompts=prompts, count=COUNT)
    expected = greedy5(bench.made(model, kind), prompts, COUNT)
    same = sum(mine == theirs for pair in zip(found, expected, strict=True) for mine, theirs in zip(*pair, strict=True))
    record.note(
        llama_cpp.version,
        "greedy tokens equal to those of transformers",
        model,
        kind,
        f"{same} of {len(TEXTS) * COUNT}",
    )
    assert found == expected
    assert len({token for text in expected for token in text}) > COUNT
