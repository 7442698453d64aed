"""The laws of the method on every MoE family of transformers; `make test` runs a dozen of them, `make test-all` all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dernkit
from dernkit.builtin.merges import SphericalKMeans
from dernkit.errors import CheckpointError
from dernkit.gather import abilities, describe
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.progress import Silent
from dernkit.registry import Registry
from dernkit.stages.apply import apply_checkpoint, apply_live
from dernkit.stages.calibrate import calibrate_checkpoint, calibrate_live
from dernkit.types import STATISTICS, Assignment, LayerPlan
from tests import families
from tests.laws.every_model import aligned, load, logits, masked, saved
from tests.laws.pipeline import DERN, recipe, run, source

REFUSED = {
    "ernie4_5_vl_moe_text": "experts for images",
    "jetmoe": "attention heads that are experts",
    "doge": "experts of one neuron",
    "switch_transformers": "an encoder and a decoder",
    "nllb_moe": "a router that transformers runs wrongly",
}
DOZEN = (
    "deepseek_v4",
    "gemma4_text",
    "gpt_oss",
    "inkling_text",
    "jamba",
    "llama4_text",
    "longcat_flash",
    "minimax_m2",
    "mistral_large4_text",
    "muse_spark_text",
    "nemotron_h",
    "dbrx",
    "zaya",
)
"""One of each kind: together they have every trap met."""

every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in DOZEN else pytest.mark.families)
        for name in families.FAMILIES
        if name not in REFUSED
    ],
)
every_shared = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name == "cohere2_moe" else pytest.mark.families)
        for name, family in families.FAMILIES.items()
        if family.shared and name not in REFUSED
    ],
)
TOKENS = torch.randint(3, families.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


@every_family
def test_keep_all_identity(folder: Path, tmp_path: Path, registry: Registry, family: str):
    saved(folder, family)
    run(folder, tmp_path / "out", recipe(registry, keep=1.0, assign=DERN, router="additive"), TOKENS)
    assert _files(tmp_path / "out") == _files(folder)


@every_family
def test_prune_is_masked_router(folder: Path, tmp_path: Path, registry: Registry, family: str):
    saved(folder, family)
    plans = run(folder, tmp_path / "out", recipe(registry), TOKENS)
    original = load(family, folder)
    with masked(original, plans):
        expected = logits(original, family)
    assert all(plan.dropped for plan in plans)
    torch.testing.assert_close(logits(load(family, tmp_path / "out"), family), expected, rtol=1e-4, atol=1e-5)


@every_family
def test_dern_disk_equals_live(folder: Path, tmp_path: Path, registry: Registry, family: str):
    saved(folder, family)
    bound = recipe(registry, assign={**DERN, "quantile": 0.5}, router="additive")
    streamed = run(folder, tmp_path / "out", bound, TOKENS)
    live = load(family, folder)
    planned = dernkit.compress(live, bound, TOKENS.split(2), registry=registry)
    assert [plan.kept.tolist() for plan in planned] == [plan.kept.tolist() for plan in streamed]
    assert all(len(plan.assignment) for plan in planned)
    _assert_same(live, load(family, tmp_path / "out"), family)


@every_family
def test_streaming_is_in_memory(folder: Path, family: str):
    saved(folder, family)
    requires, options = frozenset(STATISTICS), {"sample_size": 8, "seed": 0, "progress": Silent()}
    streamed = calibrate_checkpoint(source(folder), TOKENS.split(2), requires, **options)
    model = load(family, folder)
    live = calibrate_live(model, find_blocks(model, [Universal()]), TOKENS.split(2), requires, **options)
    assert streamed.keys() == live.keys()
    for layer, stats in live.items():
        assert stats.tokens == TOKENS.numel()
        for name in (*requires, "sample_key"):
            assert torch.equal(stats[name], streamed[layer][name]), (layer, name)


@every_family
def test_width_change_alone_changes_nothing(folder: Path, tmp_path: Path, registry: Registry, family: str):
    """Zero neurons in the experts, and whatever follows the width padded: the same function from more bytes."""
    saved(folder, family)
    model = source(folder)
    plans = [_keep_all(block.layer, block.dims) for block in model.outline[1]]
    slice_ = recipe(registry).apply.router
    for width in (32, 48):
        out = tmp_path / f"out{width}"
        out.mkdir()
        apply_checkpoint(model, plans, None, slice_, seed=0, folder=out, key="test", progress=Silent(), width=width)
        widened = load(family, out)
        assert source(out).outline[1][0].dims.width == width
        torch.testing.assert_close(logits(widened, family), logits(load(family, folder), family), rtol=1e-4, atol=1e-5)
        live = load(family, folder)
        apply_live(live, find_blocks(live, [Universal()]), plans, None, slice_, seed=0, width=width)
        _assert_same(live, widened, family)


@every_shared
def test_shared_experts_lose_nothing(folder: Path, tmp_path: Path, registry: Registry, family: str):
    """Two shared experts become one where experts get as wide as both, and three where they get narrower."""
    saved(folder, family, **{families.FAMILIES[family].shared: 2})
    model, original = source(folder), load(family, folder)
    plans = [_keep_all(block.layer, block.dims) for block in model.outline[1]]
    slice_, hidden = recipe(registry).apply.router, torch.randn(1, 4, families.HIDDEN)
    for width, merge in ((48, None), (16, SphericalKMeans())):
        out = tmp_path / f"out{width}"
        out.mkdir()
        apply_checkpoint(model, plans, merge, slice_, seed=0, folder=out, key="test", progress=Silent(), width=width)
        coupling, result = source(out).outline[1][0].family.coupling(), load(family, out)
        assert coupling.width.value == width and coupling.count.value == 48 // width
        for path in coupling.modules:
            before, after = original.get_submodule(path)(hidden), result.get_submodule(path)(hidden)
            torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)
        if merge is None:
            torch.testing.assert_close(logits(result, family), logits(original, family), rtol=1e-4, atol=1e-5)


@every_family
def test_concatenate(folder: Path, tmp_path: Path, registry: Registry, family: str):
    saved(folder, family)
    bound = recipe(registry, assign={**DERN, "quantile": 1.0}, merge="concatenate")
    run(folder, tmp_path / "out", bound, TOKENS)
    live = load(family, folder)
    dernkit.compress(live, bound, TOKENS.split(2), registry=registry)
    assert find_blocks(live, [Universal()])[0].dims.width % 64 == 0
    _assert_same(live, load(family, tmp_path / "out"), family)


@every_family
def test_inspect_tells_what_can_be_done(folder: Path, family: str):
    saved(folder, family)
    model = source(folder)
    facts = describe(model) | abilities(model)
    experts = 1 if families.FAMILIES[family].top_1 else 2
    assert (facts["experts"], facts["width"], facts["top_k"]) == (8, 24, experts)
    assert 0 < facts["expert_bytes"] < facts["bytes"]
    assert facts["new_width"].startswith(("any; ", "24 or more; "))
    assert facts["can"].startswith(f"keep {facts['smallest_keep']} to 8 experts")


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family: str, record_property: Callable[[str, object], None]):
    why = REFUSED[family]
    with pytest.raises(CheckpointError, match=why) as caught:
        find_blocks(families.build(family), [Universal()])
    assert str(caught.value).count(". ") == 2
    record_property("sentence", str(caught.value))


def _keep_all(layer: int, dims: Any) -> LayerPlan:
    scores = torch.zeros(dims.experts, dtype=torch.float64)
    return LayerPlan(layer, dims.experts, dims.width, scores, torch.arange(dims.experts), Assignment.empty())


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _assert_same(live: Any, reloaded: Any, family: str) -> None:
    for (name, mine), theirs in zip(live.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert torch.equal(logits(aligned(live.eval()), family), logits(aligned(reloaded), family))
