"""The clients, the checkpoints, and the record of what was seen: each once for all tests of this folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from tests.clients.bench import Bench
from tests.clients.client import Client
from tests.clients.record import RECORD, Record

TORCHLESS = "DERNKIT_CLIENTS_VENV"
TRANSFORMERS4 = "DERNKIT_TRANSFORMERS4_VENV"


@pytest.fixture(scope="session")
def mlx() -> Iterator[Client]:
    """mlx-lm."""
    with closing(Client("mlx_side.py", TORCHLESS)) as client:
        yield client


@pytest.fixture(scope="session")
def llama_cpp() -> Iterator[Client]:
    """llama.cpp."""
    with closing(Client("llama_cpp_side.py", TORCHLESS)) as client:
        yield client


@pytest.fixture(scope="session")
def transformers4() -> Iterator[Client]:
    """The last transformers 4."""
    with closing(Client("transformers4_side.py", TRANSFORMERS4)) as client:
        yield client


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, transformers4: Client) -> Bench:
    """Published checkpoints and results."""
    return Bench(tmp_path_factory.mktemp("clients"), transformers4)


@pytest.fixture(scope="session")
def record() -> Iterator[Record]:
    """Written to a file when all tests have run, if an environment variable names one."""
    seen = Record()
    yield seen
    if os.environ.get(RECORD):
        seen.write(Path(os.environ[RECORD]))
