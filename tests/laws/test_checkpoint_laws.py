"""The laws of the method on whole checkpoints, for every family and layout on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import dernkit
from dernkit.registry import Registry
from dernkit.testing.checkpoints import FAMILIES, save_tiny, tiny_model, tokens
from tests.laws.masking import masked_experts
from tests.laws.pipeline import DERN, recipe, run, source, tensors

LAYOUTS = {"one-file": {}, "shards": {"shard": "60KB"}, "fused": {"fused": True}}
every_family = pytest.mark.parametrize("family", FAMILIES)
every_layout = pytest.mark.parametrize("layout", LAYOUTS)
Make = Callable[..., Path]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Save a tiny checkpoint of a family in a layout."""

    def save(family: str, layout: str = "one-file", **options: object) -> Path:
        folder = tmp_path / "source"
        save_tiny(folder, family, **LAYOUTS[layout], **options)  # type: ignore[arg-type]
        return folder

    return save


@every_family
@every_layout
def test_keeping_every_expert_changes_no_byte(make: Make, tmp_path: Path, registry: Registry, family: str, layout: str):
    folder, out = make(family, layout), tmp_path / "out"
    run(folder, out, recipe(registry, keep=1.0, assign=DERN, router="additive"), tokens(4, 16))
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == files


@every_family
@every_layout
def test_threshold_one_is_bitwise_pruning(make: Make, tmp_path: Path, registry: Registry, family: str, layout: str):
    folder = make(family, layout)
    nothing_moves = recipe(registry, assign={**DERN, "threshold": 1.0}, router="additive")
    run(folder, tmp_path / "dern", nothing_moves, tokens(4, 16))
    run(folder, tmp_path / "prune", recipe(registry), tokens(4, 16))
    pruned = {file.name: file.read_bytes() for file in (tmp_path / "prune").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "dern").iterdir()} == pruned


@every_family
def test_pruning_is_masking_the_dropped_logits(make: Make, tmp_path: Path, registry: Registry, family: str):
    folder = make(family)
    plans = run(folder, tmp_path / "out", recipe(registry), tokens(4, 16))
    pruned = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens(2, 20, seed=5)
    with torch.no_grad(), masked_experts(original, plans):
        expected = original(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(pruned(ids).logits, expected, rtol=1e-4, atol=1e-5)


@every_family
@pytest.mark.parametrize("layout", ["one-file", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_disk_to_disk_and_live_surgery_give_the_same_bits(
    make: Make, tmp_path: Path, registry: Registry, family: str, layout: str, dtype: torch.dtype
):
    folder, out = make(family, layout, dtype=dtype), tmp_path / "out"
    bound = recipe(registry, assign={**DERN, "quantile": 0.5}, router="additive")
    streamed = run(folder, out, bound, tokens(4, 16))
    live = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    planned = dernkit.compress(live, bound, tokens(4, 16).split(2), registry=registry)
    assert [plan.kept.tolist() for plan in planned] == [plan.kept.tolist() for plan in streamed]
    assert all(len(plan.assignment) for plan in planned)
    reloaded, info = AutoModelForCausalLM.from_pretrained(out, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    for (name, mine), theirs in zip(live.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    ids = tokens(2, 20, seed=5)
    with torch.no_grad():
        assert torch.equal(live.eval()(ids).logits, reloaded.eval()(ids).logits)


@every_family
def test_a_live_result_saves_and_reloads(tmp_path: Path, registry: Registry, family: str):
    model = tiny_model(family)
    dernkit.compress(model, recipe(registry), tokens(4, 16).split(2), registry=registry)
    model.save_pretrained(tmp_path / "out")
    ids = tokens(2, 20, seed=5)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits)


@every_family
@every_layout
def test_config_changes_in_the_expert_count_alone(
    make: Make, tmp_path: Path, registry: Registry, family: str, layout: str
):
    folder, out = make(family, layout), tmp_path / "out"
    run(folder, out, recipe(registry, assign={**DERN, "quantile": 0.5}), tokens(4, 16))
    before = (folder / "config.json").read_text().splitlines()
    after = (out / "config.json").read_text().splitlines()
    changed = [(a.strip(), b.strip()) for a, b in zip(before, after, strict=True) if a != b]
    assert changed and all("expert" in a and a.replace("8", "4") == b for a, b in changed)


@every_family
@every_layout
@pytest.mark.parametrize("kept", [4, 6])
def test_expert_bytes_fall_by_the_ratio_asked_for(
    make: Make, tmp_path: Path, registry: Registry, family: str, layout: str, kept: int
):
    folder, out = make(family, layout), tmp_path / "out"
    run(folder, out, recipe(registry, keep=kept, assign={**DERN, "quantile": 0.5}), tokens(4, 16))
    sizes = [sum(t.numel() for name, t in tensors(place).items() if ".experts." in name) for place in (folder, out)]
    assert sizes[1] * 8 == sizes[0] * kept


@every_family
def test_untouched_tensors_keep_their_bytes(make: Make, tmp_path: Path, registry: Registry, family: str):
    folder, out = make(family, "shards"), tmp_path / "out"
    run(folder, out, recipe(registry), tokens(4, 16))
    before, after = tensors(folder), tensors(out)
    blocks = ("experts.", "gate.weight", "correction_bias")
    untouched = [name for name in before if not any(part in name for part in blocks) or "shared_experts" in name]
    assert untouched and all(torch.equal(before[name], after[name]) for name in untouched)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(after)


def test_concatenate_widens_every_expert_and_the_config(make: Make, tmp_path: Path, registry: Registry):
    folder, out = make("qwen3_moe"), tmp_path / "out"
    bound = recipe(registry, assign={**DERN, "quantile": 1.0}, merge="concatenate")
    plans = run(folder, out, bound, tokens(4, 16))
    widest = max(size for plan in plans for size in plan.pool_sizes())
    dims = source(out).open()[1][0].dims
    assert (dims.width, dims.experts) == (-(-widest // 64) * 64, 4)
    assert json.loads((out / "config.json").read_text())["moe_intermediate_size"] == dims.width


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(tmp_path: Path, registry: Registry, tied: bool):
    folder, out = tmp_path / "source", tmp_path / "out"
    save_tiny(folder, "mixtral", tie_word_embeddings=tied)
    run(folder, out, recipe(registry), tokens(4, 16))
    live = AutoModelForCausalLM.from_pretrained(folder)
    dernkit.compress(live, recipe(registry), tokens(4, 16).split(2), registry=registry)
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert ("lm_head.weight" in tensors(out)) is not tied
    assert (reloaded.lm_head.weight.data_ptr() == reloaded.model.embed_tokens.weight.data_ptr()) is tied
    ids = tokens(2, 20, seed=5)
    with torch.no_grad():
        assert torch.equal(live(ids).logits, reloaded(ids).logits)
