"""mlx-lm, which has no code of transformers' models and no torch, computes the same logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig

from tests.clients.bench import BUNDLED, SHIPPED, Bench, logits5, logits_of
from tests.clients.client import Client
from tests.clients.record import LOGITS, Record

pytestmark = pytest.mark.clients
MODELS = ("mixtral", "qwen3_moe", "olmoe", BUNDLED)
IDS = torch.randint(3, 4096, (2, 40), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("kind", ["source", *SHIPPED])
@pytest.mark.parametrize("model", MODELS)
def test_logits_are_those_of_transformers(
    mlx: Client, bench: Bench, record: Record, tmp_path: Path, model: str, kind: str
) -> None:
    folder = bench.made(model, kind)
    found, expected = logits_of(mlx, folder, IDS, tmp_path / "logits.npy"), logits5(folder, IDS)
    difference = float(np.abs(found - expected).max())
    record.note(mlx.version, LOGITS, model, kind, difference)
    assert difference <= 1e-4
    assert expected.std() > 0.5


@pytest.mark.parametrize("model", MODELS)
def test_every_recipe_makes_another_model(bench: Bench, model: str) -> None:
    logits = [logits5(bench.made(model, kind), IDS) for kind in ("source", *SHIPPED)]
    for index, mine in enumerate(logits):
        assert all(np.abs(mine - other).max() > 0.01 for other in logits[index + 1 :])


def test_a_config_that_transformers_5_wrote_would_be_noticed(mlx: Client, bench: Bench, tmp_path: Path) -> None:
    folder = shutil.copytree(bench.made("mixtral", "pruned"), tmp_path / "rewritten")
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    assert "rope_theta" not in json.loads((folder / "config.json").read_text())
    found, expected = logits_of(mlx, folder, IDS, tmp_path / "logits.npy"), logits5(folder, IDS)
    assert np.abs(found - expected).max() > 0.01
