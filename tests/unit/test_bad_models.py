"""A checkpoint that is whole but not what dernkit compresses: one sentence, exit code 5, nothing made, nothing lost."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.unit.workbench import Workbench, dernkit, edit_config, edit_tensors, is_said, put_value, said

Break = Callable[[Path], object]
LAYER = "model.layers.1.block_sparse_moe"
FIT = "{path}: the checkpoint must fit config.json. "
CONTENT: dict[str, tuple[Break, str]] = {
    "fewer experts in config": (
        lambda path: edit_config(path, num_local_experts=4),
        FIT + "Got shape [8, 32, 24] for 'model.layers.0.mlp.experts.down_proj', not [4, 32, 24], instead. "
        "Take both from the same download.",
    ),
    "more experts in config": (
        lambda path: edit_config(path, num_local_experts=16),
        FIT + "Got shape [8, 32, 24] for 'model.layers.0.mlp.experts.down_proj', not [16, 32, 24], instead. "
        "Take both from the same download.",
    ),
    "one expert's tensor missing": (
        lambda path: edit_tensors(path / "model.safetensors", lambda t: t.pop(f"{LAYER}.experts.3.w1.weight")),
        FIT + f"Got no tensor '{LAYER}.experts.3.w1.weight' instead. Download the checkpoint again.",
    ),
    "attention tensor missing": (
        lambda path: edit_tensors(
            path / "model.safetensors", lambda t: t.pop("model.layers.1.self_attn.q_proj.weight")
        ),
        FIT + "Got no tensor for 'model.layers.1.self_attn.q_proj.weight' instead. Download the checkpoint again.",
    ),
    "top-k above the number of experts": (
        lambda path: edit_config(path, num_experts_per_tok=20),
        "{path}/config.json: a token must use at most all 8 experts. Got a top-k of 20 instead. Download it again.",
    ),
    "field of the wrong type": (
        lambda path: edit_config(path, num_local_experts="eight"),
        "{path}/config.json: must describe a model that transformers {version} can build. Got 'Validation error for "
        "field 'num_local_experts'…",
    ),
    "impossible size": (
        lambda path: edit_config(path, hidden_size=-32),
        "{path}/config.json: must describe a model that transformers {version} can build. Got 'Trying to create "
        "tensor with negative dimension…",
    ),
    "quantisation in config": (
        lambda path: edit_config(path, quantization_config={"quant_method": "fp8"}),
        "{path}: quantised weights must be block-FP8 (quant_method fp8 with weight_block_size) or MXFP4. Got 'fp8' "
        "without weight_block_size instead. Dequantise to bf16 first.",
    ),
    "quantised tensors": (
        lambda path: edit_tensors(
            path / "model.safetensors",
            lambda t: t.update({f"{LAYER}.experts.0.w1.weight": torch.zeros(24, 32, dtype=torch.float8_e4m3fn)}),
        ),
        "{path}: tensors must be F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL. Got F8_E4M3 in "
        f"'{LAYER}.experts.0.w1.weight' instead. Dequantise to bf16 first.",
    ),
    "model type that transformers does not know": (
        lambda path: edit_config(path, model_type="mixtrall"),
        "{path}/config.json: must have a 'model_type' that transformers {version} knows. Got 'mixtrall' instead. "
        "A newer transformers or a plugin may know it. Did you mean 'mixtral'?",
    ),
    "code that comes with the model": (
        lambda path: edit_config(path, model_type="own", auto_map={"AutoConfig": "configuration_own.OwnConfig"}),
        "{path}: must be of a model type that transformers has. Got 'own', whose code comes with the model, instead. "
        "Install a plugin that has this architecture, or read that code, then let it run with --trust-remote-code.",
    ),
    "tokenizer of another model": (
        lambda path: (
            edit_config(path, vocab_size=40),
            edit_tensors(
                path / "model.safetensors",
                lambda t: t.update({n: t[n][:40].clone() for n in ("lm_head.weight", "model.embed_tokens.weight")}),
            ),
        ),
        "{path}: the tokenizer must give tokens below 40, the model's vocabulary. Got 71 instead. Take model and "
        "tokenizer from the same download.",
    ),
}


@pytest.mark.parametrize("case", CONTENT)
def test_a_checkpoint_that_does_not_fit_its_config_is_refused(tmp_path: Path, case: str) -> None:
    bench = Workbench(tmp_path)
    CONTENT[case][0](bench.model)
    assert is_said(bench.refusal(5), CONTENT[case][1].format(path=bench.model, version=transformers.__version__))


def tiny(name: str, **fields: Any) -> Any:
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, **fields}
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**sizes))


FOREIGN: dict[str, tuple[Callable[[], Any], str]] = {
    "not a MoE": (
        lambda: tiny("Llama", intermediate_size=48, num_key_value_heads=2),
        "llama: must be a Mixture-of-Experts model. Got a model without routed experts instead.",
    ),
    "attention heads as experts": (
        lambda: tiny("JetMoe", intermediate_size=24, num_key_value_heads=2, kv_channels=16, num_local_experts=8),
        "jetmoe: every expert must be a feed-forward network that text calibrates. Got attention heads that are "
        "experts too and follow the same count, instead. This family is not supported.",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_a_model_that_no_adapter_serves_is_refused(tmp_path: Path, case: str) -> None:
    bench = Workbench(tmp_path)
    shutil.rmtree(bench.model)
    FOREIGN[case][0]().save_pretrained(bench.model)
    assert bench.refusal(5) == FOREIGN[case][1]
    assert said(dernkit("inspect", str(bench.model)), 5) == FOREIGN[case][1]


BAD_NUMBERS = {
    "an expert": (f"{LAYER}.experts.3.w2.weight", float("nan")),
    "another expert": (f"{LAYER}.experts.3.w1.weight", float("-inf")),
    "a router": (f"{LAYER}.gate.weight", float("inf")),
    "attention": ("model.layers.1.self_attn.q_proj.weight", float("nan")),
    "the embeddings": ("model.embed_tokens.weight", float("inf")),
    "the head": ("lm_head.weight", float("nan")),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
@pytest.mark.parametrize("score", ["gate-mass", "random"])
def test_a_weight_that_is_not_finite_is_named_as_it_is_on_disk(tmp_path: Path, case: str, score: str) -> None:
    """With calibration (every layer runs) and without (only the experts and routers are looked at)."""
    bench = Workbench(tmp_path)
    name, value = BAD_NUMBERS[case]
    put_value(bench.model / "model.safetensors", name, value)
    result = bench.run(f"plan.score.use={score}")
    assert said(result, 5) == (
        f"{bench.model}: weights must be finite. Got NaN or infinity in '{name}' instead. "
        f"Download model.safetensors again."
    )
    assert not (bench.out / "model").exists()
