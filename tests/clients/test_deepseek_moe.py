"""mlx-lm's `deepseek` model, written by others and without torch, reads what the plugin for DeepSeek-MoE compresses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from dernkit.models.architecture import register_architectures
from dernkit.registry import Registry
from dernkit.testing.checkpoints import tokens
from tests.clients.bench import STAGES, logits5, logits_of
from tests.clients.client import Client
from tests.clients.record import LOGITS, Record
from tests.laws.pipeline import recipe, run

pytestmark = pytest.mark.clients

PLUGIN = Path(__file__).parents[2] / "plugins/dernkit-deepseek-moe/src"
IDS = tokens(2, 24, seed=7)
COUNTED = {
    "pruned": {"n_routed_experts": 4},
    "DERN": {"n_routed_experts": 4},
    "wider": {"n_routed_experts": 4, "moe_intermediate_size": 96, "n_shared_experts": 1},
    "narrower": {"n_routed_experts": 4, "moe_intermediate_size": 16, "n_shared_experts": 3},
}


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny checkpoint in the published form, and its architecture registered."""
    monkeypatch.syspath_prepend(PLUGIN)
    import dernkit_deepseek_moe
    from dernkit_deepseek_moe.testing import save_tiny

    with_plugin = Registry()
    with_plugin.register(dernkit_deepseek_moe, "deepseek-moe")
    register_architectures(with_plugin)
    save_tiny(tmp_path / "source")
    return tmp_path / "source"


@pytest.mark.parametrize("kind", ["source", *STAGES])
def test_logits_are_those_of_the_plugins_class(
    mlx: Client, source: Path, record: Record, registry: Registry, tmp_path: Path, kind: str
) -> None:
    folder = source if kind == "source" else tmp_path / kind
    if kind != "source":
        plans = run(source, folder, recipe(registry, **STAGES[kind]), tokens(8, 32, seed=1))
        assert kind == "pruned" or all(len(plan.assignment) for plan in plans)
        before, after = (json.loads((path / "config.json").read_text()) for path in (source, folder))
        assert after == {**before, **COUNTED[kind]}
        assert np.abs(logits5(folder, IDS) - logits5(source, IDS)).max() > 0.01
    assert mlx.call("code", folder=str(folder)) == "mlx_lm.models.deepseek"
    found, expected = logits_of(mlx, folder, IDS, tmp_path / "logits.npy"), logits5(folder, IDS)
    difference = float(np.abs(found - expected).max())
    record.note(mlx.version, LOGITS, "deepseek (plugin)", kind, difference)
    assert difference <= 1e-4
    assert expected.std() > 0.5
