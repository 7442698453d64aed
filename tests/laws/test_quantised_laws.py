"""A quantised source is the model that its codes and scales make: compressing either one gives the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config

from dernkit.models.store import Store
from dernkit.registry import Registry
from dernkit.testing.checkpoints import save_tiny, tokens
from dernkit.testing.quantised import quantise_fp8, quantise_mxfp4
from tests.laws import mtp_checkpoints
from tests.laws.moments import Moments, put_back
from tests.laws.pipeline import DERN, recipe, run, source, tensors
from tests.reference import quantised as reference
from tests.unit.workbench import Workbench, edit_config, hashes, results

INDEX = "model.safetensors.index.json"
BLOCKS = (16, 10)
"""Rows and columns of most matrices are no multiples of these."""
SOURCES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "deepseek_v3 fp8": ("deepseek_v3", lambda folder: quantise_fp8(folder, *BLOCKS)),
    "qwen3_moe fp8": ("qwen3_moe", lambda folder: quantise_fp8(folder, *BLOCKS, scales=torch.bfloat16)),
    "gpt_oss mxfp4": ("gpt_oss", quantise_mxfp4),
}
every_source = pytest.mark.parametrize("name", SOURCES)
every_layout = pytest.mark.parametrize(
    "shard", [pytest.param("5GB", id="one-file", marks=pytest.mark.families), pytest.param("60KB", id="shards")]
)


def make(folder: Path, name: str, shard: str = "5GB") -> Path:
    family, quantise = SOURCES[name]
    save_tiny(folder, family, dtype=torch.bfloat16, shard=shard)
    quantise(folder)
    return folder


def decoded(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a quantised checkpoint, by slow loops."""
    found, result = tensors(folder), {}
    for name, tensor in found.items():
        if name.endswith("_blocks"):
            base = name.removesuffix("_blocks")
            result[base] = reference.mxfp4(tensor, found[f"{base}_scales"])
        elif tensor.dtype == torch.float8_e4m3fn:
            result[name] = reference.block_fp8(tensor, found[f"{name}_scale_inv"], *BLOCKS)
        elif not name.endswith(("_scales", "_scale_inv")):
            result[name] = tensor
    return result


@every_source
@every_layout
def test_keeping_every_expert_gives_the_decoded_model(tmp_path: Path, registry: Registry, name: str, shard: str):
    folder, out = make(tmp_path / "source", name, shard), tmp_path / "out"
    run(folder, out, recipe(registry, keep=1.0, assign=DERN, router="additive"), tokens(4, 16))
    expected, found = decoded(folder), tensors(out)
    assert found.keys() == expected.keys()
    assert all(found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in expected.items())
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config") and json.loads((out / "config.json").read_text()) == config
    if shard == "60KB":
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"].keys() == found.keys()
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in found.values())


@every_source
@every_layout
@pytest.mark.parametrize("assign", [None, {**DERN, "quantile": 0.5}], ids=["prune", "dern"])
def test_compressing_it_is_compressing_the_decoded_model(
    tmp_path: Path, registry: Registry, name: str, shard: str, assign: dict[str, object] | None
):
    folder = make(tmp_path / "source", name, shard)
    run(folder, tmp_path / "decoded", recipe(registry, keep=1.0), tokens(4, 16))
    bound = recipe(registry, assign=assign, router="slice" if assign is None else "additive")
    first = run(folder, tmp_path / "one", bound, tokens(4, 16))
    second = run(tmp_path / "decoded", tmp_path / "two", bound, tokens(4, 16))
    assert [plan.kept.tolist() for plan in first] == [plan.kept.tolist() for plan in second]
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "one", dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))


@pytest.mark.parametrize(
    ("family", "quantise", "settings"),
    [
        ("deepseek_v3", lambda folder: quantise_fp8(folder, 4, 4), FineGrainedFP8Config(dequantize=True)),
        ("gpt_oss", quantise_mxfp4, Mxfp4Config(dequantize=True)),
    ],
)
def test_it_is_what_transformers_decodes(
    tmp_path: Path, registry: Registry, family: str, quantise: Callable[[Path], None], settings: object
):
    """Where blocks divide the matrices; transformers takes other blocks for others where they do not."""
    folder, out = tmp_path / "source", tmp_path / "out"
    save_tiny(folder, family, dtype=torch.bfloat16)
    quantise(folder)
    run(folder, out, recipe(registry, keep=1.0), tokens(4, 16))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", quantization_config=settings)
    mine = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
    assert mine.dtype == theirs.dtype == torch.bfloat16
    for (name, a), b in zip(mine.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    ids = tokens(2, 20, seed=5)
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize("written", [{"dtype": None}, {"dtype": None, "torch_dtype": "bfloat16"}, {"dtype": "float32"}])
def test_the_result_loads_in_the_dtype_that_it_was_made_in(tmp_path: Path, registry: Registry, written: dict):
    """Although most tensors, and the first of them, are float32."""
    folder, out = make(tmp_path / "source", "gpt_oss mxfp4"), tmp_path / "out"
    wider = {name: t.float() if t.is_floating_point() else t for name, t in tensors(folder).items()}
    save_file(wider, folder / "model.safetensors", metadata={"format": "pt"})
    edit_config(folder, **written)
    dtype = source(folder).dtype
    run(folder, out, recipe(registry), tokens(4, 16))
    assert dtype == (torch.float32 if written["dtype"] else torch.bfloat16)
    assert AutoModelForCausalLM.from_pretrained(out, dtype="auto").dtype == dtype


@pytest.mark.parametrize("keep", [0.5, 1.0])
def test_scales_may_lie_in_other_shards_than_codes(tmp_path: Path, registry: Registry, keep: float):
    folder = make(tmp_path / "source", "deepseek_v3 fp8")
    run(folder, tmp_path / "expected", recipe(registry, keep=keep), tokens(4, 16))
    everything = tensors(folder)
    weight_map = {name: f"model-{int(name.endswith('_scale_inv'))}.safetensors" for name in everything}
    for shard in set(weight_map.values()):
        part = {name: tensor for name, tensor in everything.items() if weight_map[name] == shard}
        save_file(part, folder / shard, metadata={"format": "pt"})
    (folder / "model.safetensors").unlink()
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    run(folder, tmp_path / "out", recipe(registry, keep=keep), tokens(4, 16))
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == ["model-0.safetensors"]
    expected, found = tensors(tmp_path / "expected"), tensors(tmp_path / "out")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("name", ["deepseek_v3 fp8", "gpt_oss mxfp4"])
def test_a_kill_changes_no_byte_of_the_result(tmp_path: Path, name: str):
    family, quantise = SOURCES[name]
    bench = Workbench(tmp_path, family, dtype=torch.bfloat16, shard="60KB")
    quantise(bench.model)
    bench.out = tmp_path / "watched"
    moments = Moments(bench.out)
    with moments.watched():
        bench.finish()
    expected = {key: value for key, value in results(bench.out).items() if key != "report.md"}
    states = [state for state in moments.states if any(".partial/model/" in file for file in state)]
    assert len(states) >= 40
    for number, state in enumerate(states[:: len(states) // 7]):
        bench.out = put_back(state, tmp_path / str(number) / "out")
        bench.finish()
        assert {key: value for key, value in results(bench.out).items() if key != "report.md"} == expected


def test_no_more_than_one_layer_is_real(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch):
    folder = make(tmp_path / "source", "deepseek_v3 fp8")
    seen, load = [], Store.load

    def watched(store: Store, prefix: str) -> object:
        module = load(store, prefix)
        real = {name for name, parameter in store.model.named_parameters() if not parameter.is_meta}
        seen.append({int(name.split(".")[2]) for name in real if ".layers." in name})
        return module

    monkeypatch.setattr(Store, "load", watched)
    run(folder, tmp_path / "out", recipe(registry), tokens(4, 16))
    assert {2} in seen and all(len(layers) == 1 for layers in seen)


@pytest.mark.parametrize("mtp", ["compress", "drop"])
@pytest.mark.parametrize("merge", ["spherical-kmeans", "concatenate"])
def test_quantised_mtp_layers_are_those_of_the_decoded_model(tmp_path: Path, registry: Registry, mtp: str, merge: str):
    """The published DeepSeek-V3: block-FP8 with an MTP layer; wider experts take its shared expert along."""
    folder = tmp_path / "source"
    mtp_checkpoints.save(folder, "deepseek", shard="60KB")
    quantise_fp8(folder, *BLOCKS)
    run(folder, tmp_path / "decoded", recipe(registry, keep=1.0), tokens(4, 16))
    bound = recipe(registry, assign={**DERN, "quantile": 0.5}, merge=merge, mtp=mtp)
    run(folder, tmp_path / "one", bound, tokens(4, 16))
    run(tmp_path / "decoded", tmp_path / "two", bound, tokens(4, 16))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "two")
    found = {name: t for name, t in tensors(tmp_path / "one").items() if name.startswith("model.layers.3.")}
    assert bool(found) == (mtp == "compress") and not any(name.endswith("scale_inv") for name in found)
    if found:
        trunk = tensors(tmp_path / "one")
        for name in ("mlp.experts.3.up_proj.weight", "mlp.shared_experts.up_proj.weight", "mlp.gate.weight"):
            assert found[f"model.layers.3.{name}"].shape == trunk[f"model.layers.2.{name}"].shape
        assert "model.layers.3.mlp.experts.4.up_proj.weight" not in found
