"""mlx-lm's `deepseek` model, written by others and without torch, gives the same logits, before and after.

Opt-in: `pytest -m clients` with DERNKIT_CLIENTS_VENV naming an environment that has mlx and mlx-lm.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from dernkit.models.architecture import register_architectures
from dernkit.registry import Registry
from tests.laws.pipeline import DERN, recipe, run

pytestmark = pytest.mark.clients

PLUGIN = Path(__file__).parents[2] / "plugins/dernkit-deepseek-moe/src"
CLIENT = """
import sys
import mlx.core as mx
import numpy
from mlx_lm.utils import load_model
from pathlib import Path
model, config = load_model(Path(sys.argv[1]))
model.set_dtype(mx.float32)
numpy.save(sys.argv[3], numpy.array(model(mx.array(numpy.load(sys.argv[2])))))
print(config["model_type"], type(model).__module__)
"""
RECIPES = {"prune": {}, "dern": {"assign": {**DERN, "quantile": 0.5}, "router": "additive"}}


@pytest.fixture(scope="module")
def client() -> Path:
    """Python of the clients' environment."""
    folder = os.environ.get("DERNKIT_CLIENTS_VENV")
    if not folder:
        pytest.fail(
            "DERNKIT_CLIENTS_VENV must name an environment with mlx and mlx-lm. Got none instead. Make one: "
            "python -m venv clients && clients/bin/pip install 'mlx[cpu]' mlx-lm, "
            "then: DERNKIT_CLIENTS_VENV=clients python -m pytest -m clients",
            pytrace=False,
        )
    return Path(folder).absolute() / "bin/python"


@pytest.fixture
def source(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint in the published form, and its architecture registered."""
    monkeypatch.syspath_prepend(PLUGIN)
    import dernkit_deepseek_moe
    from dernkit_deepseek_moe.testing import save_tiny

    with_plugin = Registry()
    with_plugin.register(dernkit_deepseek_moe, "deepseek-moe")
    register_architectures(with_plugin)
    save_tiny(tmp_path / "source")
    return tmp_path / "source"


def both(folder: Path, client: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [2, 24, V] of the same random token ids: the client's and our own class's."""
    ids = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(7))
    numpy.save(folder.parent / "ids.npy", ids.numpy())
    command = [client, "-c", CLIENT, folder, folder.parent / "ids.npy", folder.parent / "logits.npy"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["deepseek", "mlx_lm.models.deepseek"]
    theirs = torch.from_numpy(numpy.load(folder.parent / "logits.npy"))
    with torch.no_grad():
        return theirs, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits


def test_the_source_has_the_clients_logits(source: Path, client: Path) -> None:
    theirs, ours = both(source, client)
    assert ours.std() > 0.5
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", RECIPES)
def test_the_result_has_the_clients_logits(
    source: Path, client: Path, tmp_path: Path, registry: Registry, name: str
) -> None:
    ids = torch.randint(3, 96, (8, 32), generator=torch.Generator().manual_seed(1))
    plans = run(source, tmp_path / "out", recipe(registry, **RECIPES[name]), ids)
    assert name == "prune" or all(len(plan.assignment) for plan in plans)
    theirs, ours = both(tmp_path / "out", client)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert (ours - both(source, client)[1]).abs().max() > 0.01
