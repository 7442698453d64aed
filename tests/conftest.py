"""Settings of the whole test suite: no network, no progress bars, one thread, quiet transformers."""

import os

os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TRANSFORMERS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
)

import pytest
import torch
import transformers

from dernkit.registry import Registry

torch.set_num_threads(1)
transformers.logging.disable_progress_bar()
transformers.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def registry() -> Registry:
    """The built-in components only: what else is installed must not change a test."""
    return Registry.load(entry_points=False)
