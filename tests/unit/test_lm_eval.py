"""lm-eval runs on local tasks without a network, and says what it measured on each document."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from dernkit.api import RecipeError, Subject
from dernkit.builtin.lm_eval import LmEval
from dernkit.kernel import calls
from dernkit.testing.checkpoints import tiny_model
from tests.unit.workbench import save_tokenizer


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """A tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    save_tokenizer(folder)
    return Subject(tiny_model("qwen2_moe", num_hidden_layers=2), AutoTokenizer.from_pretrained(folder), folder)


def nats(subject: Subject, text: str) -> torch.Tensor:
    """The loss of every token but the first in one forward pass."""
    ids = torch.tensor(subject.tokenizer(text)["input_ids"])
    with torch.no_grad():
        logits = subject.model(input_ids=ids[None]).logits[0]
    return torch.nn.functional.cross_entropy(logits[:-1].double(), ids[1:], reduction="none")


TASK = """\
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, {metric: f1}, {metric: mcc}]
"""


WORD = """\
task: tiny_word
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " w3"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLLING = """\
task: tiny_text
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} w7"
metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with tasks and their data; lm-eval's thousands of own tasks are not indexed."""
    lm_tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setattr(lm_tasks, "TaskManager", functools.partial(lm_tasks.TaskManager, include_defaults=False))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [{"question": f"w{i} w{i + 1}", "choices": ["w3", "w4 w5"], "label": i % 2} for i in range(6)]
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "tasks").mkdir()
    for name, words in (("tiny", TASK), ("word", WORD), ("text", ROLLING)):
        (tmp_path / f"tasks/{name}.yaml").write_text(words.replace("FILE", str(tmp_path / "data.jsonl")))
    yield tmp_path / "tasks"


def test_lm_eval_runs_a_local_task(subject: Subject, tasks: Path) -> None:
    found = LmEval(("tiny_choice",), include_path=tasks, batch_size=2, bootstrap=0).evaluate(subject)
    assert found["tiny_choice/samples"] == 6
    assert 0 <= found["tiny_choice/acc"] <= 1
    right = 0
    for i in range(6):
        scores = [choice_score(subject, f"w{i} w{i + 1}", choice) for choice in ("w3", "w4 w5")]
        right += scores.index(max(scores)) == i % 2
    assert found["tiny_choice/acc"] == right / 6


def choice_score(subject: Subject, question: str, choice: str) -> float:
    """Summed log-likelihood of the choice after the question."""
    return -float(nats(subject, f"{question} {choice}")[-len(choice.split()) :].sum())


def test_an_unknown_task_is_refused(subject: Subject, tasks: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        LmEval(("tiny_choice", "arc_esay"), include_path=tasks).evaluate(subject)
    assert str(caught.value) == (
        "lm-eval.tasks: must be tasks that lm-eval knows. Got 'arc_esay' instead. List them with: lm_eval ls tasks"
    )


def test_a_task_without_its_data_is_refused(subject: Subject, tasks: Path) -> None:
    (tasks.parent / "data.jsonl").unlink()
    with pytest.raises(RecipeError, match=r"^lm-eval\.tasks: must run to their end\. Got 'FileNotFoundError: Unable"):
        LmEval(("tiny_choice",), include_path=tasks).evaluate(subject)


def test_what_lm_eval_measured_on_each_document_adds_up_to_its_results(subject: Subject, tasks: Path) -> None:
    names = ("tiny_choice", "tiny_word", "tiny_text")
    evaluator = LmEval(names, include_path=tasks, limit=5, batch_size=2, bootstrap=0)
    found, seen = evaluator.evaluate(subject), calls.observe(evaluator, subject)
    assert list(seen) == ["acc", "bits_per_byte", "nats", "nats_per_word"]  # f1 and mcc are no means of documents
    acc = seen["acc"]
    assert acc.documents == tuple(f"{task}:{i}" for task in names[:2] for i in range(5))
    assert acc.groups == ("tiny_choice",) * 5 + ("tiny_word",) * 5
    assert acc.by_group() == {task: pytest.approx(found[f"{task}/acc"]) for task in names[:2]}
    assert [each.higher_is_better for each in seen.values()] == [True, False, False, False]
    assert seen["nats"].groups == ("tiny_word",) * 5
    expected = [float(nats(subject, f"w{i} w{i + 1} w3")[-1]) for i in range(5)]
    assert seen["nats"].values == pytest.approx(expected, rel=1e-5)
    assert math.exp(seen["nats"].mean()) == pytest.approx(found["tiny_word/perplexity"])
    assert seen["bits_per_byte"].by_group() == {"tiny_text": pytest.approx(found["tiny_text/bits_per_byte"])}
    assert seen["bits_per_byte"].weights.tolist() == [8.0] * 5
    assert math.exp(seen["nats_per_word"].mean()) == pytest.approx(found["tiny_text/word_perplexity"])


def test_documents_are_those_of_the_task_whatever_the_model(subject: Subject, tasks: Path) -> None:
    evaluator = LmEval(("tiny_choice",), include_path=tasks, batch_size=4)
    other = Subject(tiny_model("mixtral", seed=3), subject.tokenizer, subject.path)
    first, second = (evaluator.observe(each)["acc"] for each in (subject, other))
    assert first.documents == second.documents == tuple(f"tiny_choice:{i}" for i in range(6))
