"""Experts that are modules of their own obey the laws that stacked ones do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from dernkit.api import CheckpointError
from dernkit.models.groups import regrouped
from dernkit.models.source import SourceModel, find_blocks, open_source
from dernkit.progress import Silent
from dernkit.recipe import Recipe
from dernkit.registry import Registry
from dernkit.stages.apply import apply_checkpoint, apply_live
from dernkit.stages.calibrate import batched, calibrate_checkpoint, calibrate_live
from dernkit.stages.plan import plan_checkpoint
from dernkit.types import LayerPlan
from tests.laws.module_models import MODELS, OwnAdapter, build
from tests.laws.pipeline import DERN, TOKENS, recipe, tensors

IDS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
SHARDS = "40KB"


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A model, also on disk in several shards."""
    model = build(request.param)
    model.save_pretrained(tmp_path / "model", max_shard_size=SHARDS)
    return model, tmp_path / "model"


def opened(folder: Path) -> SourceModel:
    return open_source(folder, [OwnAdapter()])


def planned(source: SourceModel, bound: Recipe) -> list[LayerPlan]:
    statistics = calibrate_checkpoint(
        source, batched(IDS, 2), bound.requires, sample_size=TOKENS, seed=bound.seed, progress=Silent()
    )
    return plan_checkpoint(source, bound.plan, statistics, Silent())


def compressed(folder: Path, out: Path, bound: Recipe) -> list[LayerPlan]:
    source = opened(folder)
    plans = planned(source, bound)
    out.mkdir()
    applied(source, plans, bound, out)
    return plans


def applied(source: SourceModel, plans: list[LayerPlan], bound: Recipe, out: Path, progress: Any = None) -> None:
    merge, router = bound.apply.merge, bound.apply.router
    arguments = {"seed": bound.seed, "folder": out, "key": "test", "progress": progress or Silent()}
    apply_checkpoint(source, plans, merge, router, **arguments)


def loaded(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


@contextmanager
def masked(model: Any, plans: Sequence[LayerPlan]) -> Iterator[None]:
    """The model whose routers do not see the dropped experts."""
    hooks = []
    for plan in plans:

        def hide(_: Any, args: Any, logits: Tensor, dropped: list[int] = plan.dropped) -> Tensor:
            return logits.index_fill(-1, torch.tensor(dropped), -torch.inf)

        hooks.append(model.stack[plan.layer].ffn.selector.register_forward_hook(hide))
    yield
    for hook in hooks:
        hook.remove()


def test_what_keeps_everything_writes_the_sources_bytes(saved: Any, tmp_path: Path, registry: Registry):
    compressed(saved[1], tmp_path / "out", recipe(registry, keep=1.0))
    for file in sorted(saved[1].iterdir()):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_pruning_is_masking_the_router(saved: Any, tmp_path: Path, registry: Registry):
    plans = compressed(saved[1], tmp_path / "out", recipe(registry))
    pruned = loaded(tmp_path / "out")
    assert pruned.config.specialists == 4 and len(pruned.stack[0].ffn.specialists) == 4
    with torch.no_grad(), masked(saved[0], plans):
        torch.testing.assert_close(pruned(IDS).logits, saved[0](IDS).logits, rtol=1e-4, atol=1e-5)
    kept = {name for name in tensors(saved[1]) if ".specialists." not in name}
    assert {name for name in tensors(tmp_path / "out") if ".specialists." not in name} == kept


@pytest.mark.parametrize("merge", ["spherical-kmeans", "concat"])
def test_live_surgery_has_the_bits_of_the_checkpoint(saved: Any, merge: str, tmp_path: Path, registry: Registry):
    bound = recipe(registry, assign={**DERN, "threshold": 0.1}, merge=merge)
    if merge == "concat" and saved[0].config.model_type == "own_dict":
        pass
    model = saved[0]
    plans = compressed(saved[1], tmp_path / "out", bound)
    blocks = regrouped(model, find_blocks(model, [OwnAdapter()]), collapse=False)
    statistics = calibrate_live(
        model, blocks, batched(IDS, 2), bound.requires, sample_size=TOKENS, seed=bound.seed, progress=Silent()
    )
    stored = calibrate_checkpoint(
        opened(saved[1]), batched(IDS, 2), bound.requires, sample_size=TOKENS, seed=bound.seed, progress=Silent()
    )
    for layer, values in statistics.items():
        assert all(torch.equal(value, stored[layer].values[name]) for name, value in values.values.items())
    apply_live(model, blocks, plans, bound.apply.merge, bound.apply.router, seed=bound.seed)
    assert any(len(plan.assignment.source) for plan in plans)
    on_disk, state = tensors(tmp_path / "out"), model.state_dict()
    assert on_disk.keys() == state.keys()
    assert all(torch.equal(on_disk[name], value) for name, value in state.items())
    model.save_pretrained(tmp_path / "live")
    for result in (loaded(tmp_path / "out"), loaded(tmp_path / "live")):
        with torch.no_grad():
            assert torch.equal(result(IDS).logits, loaded(tmp_path / "out")(IDS).logits)
    assert find_blocks(model, [OwnAdapter()])[0].dims.experts == 4
    assert opened(tmp_path / "out").outline[1][0].dims == find_blocks(model, [OwnAdapter()])[0].dims
