"""Quantised checkpoints from the command line: what is said of them, and which ones are refused, with which words."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.quantizers import AutoHfQuantizer

import dernkit as library
from dernkit.errors import CheckpointError
from dernkit.models.config_text import remove
from dernkit.stages.evaluate import load_subject
from dernkit.testing.checkpoints import tiny_model, tokens
from dernkit.testing.quantised import quantise_fp8, quantise_mxfp4
from tests.unit.workbench import Workbench, dernkit, edit_config, edit_json, edit_tensors, put_value, said, succeeded

FILE = "model.safetensors"
EXPERTS = "model.layers.1.mlp.experts"
DOWN = f"{EXPERTS}.5.down_proj.weight"


def fp8(root: Path, rows: int = 16, columns: int = 10) -> Workbench:
    bench = Workbench(root, "deepseek_v3", dtype=torch.bfloat16)
    quantise_fp8(bench.model, rows, columns)
    return bench


def mxfp4(root: Path) -> Workbench:
    bench = Workbench(root, "gpt_oss", dtype=torch.bfloat16)
    quantise_mxfp4(bench.model)
    return bench


@pytest.mark.parametrize(("make", "scheme"), [(fp8, "fp8 in blocks of 16x10"), (mxfp4, "mxfp4")], ids=["fp8", "mxfp4"])
def test_a_run_says_what_was_read_and_what_was_written(tmp_path: Path, make: Callable[..., Workbench], scheme: str):
    bench = make(tmp_path)
    before = succeeded(dernkit("inspect", str(bench.model))).stdout
    assert f"quantisation     {scheme}, read as bf16\n" in before
    assert json.loads(dernkit("inspect", str(bench.model), "--json").stdout)["quantisation"] == scheme
    bench.write(evaluate=[{"use": "perplexity", "path": str(bench.text), "length": 16}])
    out = bench.finish("plan.keep=0.5")
    after = succeeded(dernkit("inspect", str(out))).stdout
    assert "quantisation" not in after and "BF16" in after and "U8" not in after and "F8" not in after
    report = (bench.out / "report.md").read_text()
    sentence = f"The source is quantised ({scheme}). It was read as bf16 and the result is written in bf16, without"
    assert sentence in report and "layers; parameters fall by " in report
    card = (out / "README.md").read_text()
    assert f"The source is quantised ({scheme}). It was read as bf16, and these weights are bf16.\n" in card
    assert "quantization_config" not in (out / "config.json").read_text()


def test_a_plain_source_is_not_called_quantised(tmp_path: Path):
    bench = Workbench(tmp_path)
    out = bench.finish()
    assert "quantisation" not in dernkit("inspect", str(bench.model)).stdout
    assert "quantis" not in (bench.out / "report.md").read_text() + (out / "README.md").read_text()


def test_inspect_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    bench = fp8(tmp_path)
    monkeypatch.setattr("dernkit.models.checkpoint.Checkpoint.slices", None)
    assert "fp8 in blocks" in succeeded(dernkit("inspect", str(bench.model))).stdout


@pytest.mark.parametrize("make", [fp8, mxfp4])
def test_the_source_is_evaluated_as_it_is_read(tmp_path: Path, make: Callable[..., Workbench]):
    """The same logits as a result that keeps all experts, blocks cut off at the edge included."""
    bench = make(tmp_path)
    out = bench.finish("plan.keep=1.0")
    source, result = load_subject(bench.model), load_subject(out)
    ids = tokens(2, 12) % 80
    with torch.no_grad():
        assert torch.equal(source.model(ids).logits, result.model(ids).logits)


def without(name: str) -> Callable[[Workbench], None]:
    return lambda bench: edit_tensors(bench.model / FILE, lambda tensors: tensors.pop(name))


def with_tensors(**changes: Callable[[dict[str, Tensor]], Tensor]) -> Callable[[Workbench], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.update({name: make(tensors) for name, make in changes.items()})

    return lambda bench: edit_tensors(bench.model / FILE, change)


def declaring(**fields: Any) -> Callable[[Workbench], None]:
    """Other fields of the quantization_config; None removes one."""

    def change(config: dict[str, Any]) -> None:
        declared = config["quantization_config"] | fields
        config["quantization_config"] = {key: value for key, value in declared.items() if value is not None}

    return lambda bench: edit_json(bench.model / "config.json", change)


UNREAD = "quantised weights must be block-FP8 (quant_method fp8 with weight_block_size) or MXFP4. Got"
AGAIN = "Download the checkpoint again."
BLOCKS, SCALES = f"{EXPERTS}.down_proj_blocks", f"{EXPERTS}.down_proj_scales"
REFUSED: dict[str, tuple[Callable[..., Workbench], Callable[[Workbench], None], str]] = {
    "another method": (fp8, declaring(quant_method="gptq"), f"{UNREAD} 'gptq' instead. Dequantise to bf16 first."),
    "compressed-tensors": (
        fp8,
        declaring(quant_method="compressed-tensors", format="float-quantized"),
        f"{UNREAD} 'compressed-tensors' instead. Dequantise to bf16 first.",
    ),
    "no method": (
        fp8,
        declaring(quant_method=None),
        f"{UNREAD} a quantization_config without quant_method instead. Dequantise to bf16 first.",
    ),
    "fp8 with one scale": (
        fp8,
        declaring(weight_block_size=None),
        f"{UNREAD} 'fp8' without weight_block_size instead. Dequantise to bf16 first.",
    ),
    "odd blocks": (
        fp8,
        declaring(weight_block_size=[128]),
        f"{UNREAD} 'fp8' with weight_block_size [128] instead. Dequantise to bf16 first.",
    ),
    "quantised activations": (
        fp8,
        declaring(activation_scheme="static"),
        f"{UNREAD} 'fp8' with activation_scheme 'static' instead. Dequantise to bf16 first.",
    ),
    "no codes": (
        fp8,
        without(DOWN),
        f"'{DOWN}' must be the codes of '{DOWN}_scale_inv', F8_E4M3. Got no such tensor. {AGAIN}",
    ),
    "no scales": (
        fp8,
        without(f"{DOWN}_scale_inv"),
        f"'{DOWN}_scale_inv' must be the scales of '{DOWN}', F32 or BF16 or F8_E8M0 [2, 3]. Got no such tensor. "
        f"{AGAIN}",
    ),
    "scales of other blocks": (
        fp8,
        declaring(weight_block_size=[16, 16]),
        "'model.layers.0.mlp.down_proj.weight_scale_inv' must be the scales of 'model.layers.0.mlp.down_proj.weight', "
        f"F32 or BF16 or F8_E8M0 [2, 4]. Got F32 [2, 6] instead. {AGAIN}",
    ),
    "scales in integers": (
        fp8,
        with_tensors(**{f"{DOWN}_scale_inv": lambda t: torch.ones(2, 3, dtype=torch.int8)}),
        f"'{DOWN}_scale_inv' must be the scales of '{DOWN}', F32 or BF16 or F8_E8M0 [2, 3]. Got I8 [2, 3] instead. "
        f"{AGAIN}",
    ),
    "scales of weights that are not quantised": (
        fp8,
        with_tensors(**{DOWN: lambda t: t[DOWN].to(torch.bfloat16)}),
        f"'{DOWN}' must be the codes of '{DOWN}_scale_inv', F8_E4M3. Got BF16 [32, 24] instead. {AGAIN}",
    ),
    "codes of another format": (
        fp8,
        with_tensors(**{DOWN: lambda t: t[DOWN].float().to(torch.float8_e5m2)}),
        f"'{DOWN}' must be the codes of '{DOWN}_scale_inv', F8_E4M3. Got F8_E5M2 [32, 24] instead. {AGAIN}",
    ),
    "a quantised norm": (
        fp8,
        with_tensors(**{"model.norm.weight": lambda t: t["model.norm.weight"].to(torch.float8_e4m3fn)}),
        "F8_E4M3 tensors must be matrices. Got 'model.norm.weight' of shape [32] instead. Dequantise to bf16 first.",
    ),
    "codes of another shape": (
        fp8,
        with_tensors(
            **{DOWN: lambda t: t[DOWN][:24].clone(), f"{DOWN}_scale_inv": lambda t: t[f"{DOWN}_scale_inv"][:2].clone()}
        ),
        f"the checkpoint must fit config.json. Got tensors that do not fit together for '{EXPERTS}.down_proj' instead. "
        f"{AGAIN}",
    ),
    "nothing quantised": (
        fp8,
        lambda bench: edit_tensors(
            bench.model / FILE,
            lambda t: [
                t.pop(name) if name.endswith("_scale_inv") else t.update({name: t[name].to(torch.bfloat16)})
                for name in list(t)
            ],
        ),
        "weights must be quantised as quantization_config says (fp8 in blocks of 16x10). Got no quantised tensor "
        "instead. Remove quantization_config from config.json, or download the checkpoint again.",
    ),
    "two ways": (
        fp8,
        lambda bench: edit_config(bench.model, text_config={"quantization_config": {"quant_method": "mxfp4"}}),
        "all parts must be quantised in one way. Got fp8 in blocks of 16x10 and mxfp4 instead. "
        "Dequantise to bf16 first.",
    ),
    "mxfp4 without scales": (
        mxfp4,
        without(SCALES),
        f"'{SCALES}' must be the scales of '{BLOCKS}', U8 [8, 64, 1]. Got no such tensor. {AGAIN}",
    ),
    "mxfp4 without blocks": (
        mxfp4,
        without(BLOCKS),
        f"'{BLOCKS}' must be the blocks of '{SCALES}', U8. Got no such tensor. {AGAIN}",
    ),
    "damaged blocks": (
        mxfp4,
        with_tensors(**{BLOCKS: lambda t: t[BLOCKS][..., :12].clone()}),
        f"'{BLOCKS}' must be packed weights, U8 [8, 64, 1, 16]. Got U8 [8, 64, 1, 12] instead. {AGAIN}",
    ),
    "blocks of fewer experts": (
        mxfp4,
        with_tensors(**{BLOCKS: lambda t: t[BLOCKS][:7].clone(), SCALES: lambda t: t[SCALES][:7].clone()}),
        f"the checkpoint must fit config.json. Got shape [7, 32, 64] for '{EXPERTS}.down_proj', not [8, 32, 64], "
        f"instead. Take both from the same download.",
    ),
    "blocks beside the weight": (
        mxfp4,
        with_tensors(**{f"{EXPERTS}.down_proj": lambda t: torch.zeros(8, 32, 64)}),
        f"a weight must be stored once. Got both '{EXPERTS}.down_proj' and '{BLOCKS}' instead. {AGAIN}",
    ),
    "mxfp4 that is not there": (
        fp8,
        lambda bench: edit_config(bench.model, quantization_config={"quant_method": "mxfp4"}),
        "weights must be quantised as quantization_config says (mxfp4). Got no quantised tensor instead. "
        "Remove quantization_config from config.json, or download the checkpoint again.",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_read_is_refused(tmp_path: Path, case: str):
    make, damage, sentence = REFUSED[case]
    bench = make(tmp_path)
    damage(bench)
    assert bench.refusal(5) == f"{bench.model}: {sentence}"
    assert said(dernkit("inspect", str(bench.model)), 5) == f"{bench.model}: {sentence}"


NUMBERS: dict[str, tuple[Callable[..., Workbench], str, float, str]] = {
    "a code": (fp8, DOWN, float("nan"), DOWN),
    "a scale": (fp8, f"{DOWN}_scale_inv", float("inf"), DOWN),
    "a product": (fp8, f"{DOWN}_scale_inv", 3e38, DOWN),
    "attention": (fp8, "model.layers.1.self_attn.o_proj.weight_scale_inv", float("nan"), "self_attn.o_proj.weight"),
    "an exponent": (mxfp4, SCALES, 255, f"{EXPERTS}.down_proj"),
}


@pytest.mark.parametrize("case", NUMBERS)
@pytest.mark.parametrize("score", ["gate-mass", "random"])
def test_a_weight_that_is_not_finite_when_decoded_is_named(tmp_path: Path, case: str, score: str):
    make, name, value, named = NUMBERS[case]
    bench = make(tmp_path)
    put_value(bench.model / FILE, name, value)
    result = bench.run(f"plan.score={{use: {score}}}")
    sentence = said(result, 5)
    assert sentence.startswith(f"{bench.model}: weights must be finite. Got NaN or infinity in '")
    assert f"{named}' instead. Download {FILE} again." in sentence
    assert not (bench.out / "model").exists()


def test_a_text_model_in_a_nested_config_may_be_the_quantised_one():
    from dernkit.models.quantised import BlockFp8, scheme_of

    declared = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    assert scheme_of(Path("x"), {"text_config": {"quantization_config": declared}}) == BlockFp8(128, 128)
    assert scheme_of(Path("x"), {"quantization_config": declared, "text_config": {"quantization_config": declared}})
    assert scheme_of(Path("x"), {"quantization_config": None, "text_config": {"quantization_config": {}}}) is None


def test_a_model_whose_weights_stay_quantised_in_memory_is_refused(tmp_path: Path):
    bench = fp8(tmp_path, 4, 4)
    config = AutoConfig.from_pretrained(bench.model)
    model = tiny_model("deepseek_v3", dtype=torch.bfloat16)
    model.config.quantization_config = config.quantization_config
    AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True).preprocess_model(model)
    assert type(model.model.layers[1].self_attn.o_proj).__name__ == "FP8Linear"
    with pytest.raises(CheckpointError) as refusal:
        library.compress(model, bench.recipe, [tokens(2, 8)])
    assert str(refusal.value) == (
        "deepseek_v3: weights in memory must be float32, bfloat16 or float16. Got 'fp8' quantisation instead. Load "
        "the model with a quantization_config that dequantises, or compress the checkpoint with `dernkit run`."
    )


def test_a_model_that_was_dequantised_when_it_was_loaded_is_compressed(tmp_path: Path):
    bench = mxfp4(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype="auto")  # without a GPU it is dequantised
    library.compress(model, bench.recipe, [tokens(2, 8) % 80])
    assert model.config.num_local_experts == 4


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ('{\n  "a": 1,\n  "q": {"x": [1, {}]},\n  "b": 2\n}\n', '{\n  "a": 1,\n  "b": 2\n}\n'),
        ('{\r\n\t"a": 1,\r\n\t"q": null\r\n}', '{\r\n\t"a": 1\r\n}'),
        ('{ "q" : 1 , "b": 2}', '{ "b": 2}'),
        ('{ "q": 1 }', "{}"),
        ('{"q": 1, "a": "q", "q": 2, "n": {"q": 3}}', '{"a": "q", "n": {"q": 3}}'),
        ('{"a": {"b": 1}}', '{"a": {"b": 1}}'),
    ],
)
def test_a_key_is_removed_and_every_other_byte_stays(text: str, left: str):
    assert remove(text, [("q",)]) == left


def test_a_nested_key_is_removed():
    assert remove('{"t": {"a": 1, "q": 2}, "q": 3}', [("t", "q")]) == '{"t": {"a": 1}, "q": 3}'
