"""Multi-token-prediction layers keep up with the model's experts, or are dropped; never left behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DeepseekV3ForCausalLM
from transformers.modeling_layers import MtpModel

from dernkit.errors import CheckpointError
from dernkit.kernel.compress import compress_layer
from dernkit.models.source import SourceModel
from dernkit.recipe import Recipe
from dernkit.registry import Registry
from dernkit.stages import apply
from dernkit.stages.journal import JOURNAL
from dernkit.testing.checkpoints import tokens
from dernkit.types import ExpertBank, LayerPlan
from tests.laws.mtp_checkpoints import KINDS, LAYOUTS, add, in_place_of_last, is_routed, save
from tests.laws.pipeline import DERN, carry_out, recipe, run, source, tensors
from tests.unit.workbench import edit_config

every_kind = pytest.mark.parametrize("kind", KINDS)
every_layout = pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=pytest.mark.families if name in ("shards", "fused") else ()) for name in LAYOUTS],
)
HALF = {**DERN, "quantile": 0.5}


def again(model: SourceModel, plans: list[LayerPlan], bound: Recipe, out: Path) -> dict[str, Tensor]:
    """Apply plans that were made before."""
    carry_out(model, plans, bound, out)
    return tensors(out)


@every_kind
@every_layout
def test_keeping_every_expert_changes_no_byte(tmp_path: Path, registry: Registry, kind: str, layout: str):
    folder, out = tmp_path / "source", tmp_path / "out"
    save(folder, kind, **LAYOUTS[layout])
    run(folder, out, recipe(registry, keep=1.0, assign=DERN, router="additive"), tokens(4, 16))
    files = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == files


@every_kind
@every_layout
def test_an_mtp_block_is_compressed_as_if_it_were_the_last_one(
    tmp_path: Path, registry: Registry, kind: str, layout: str
):
    """The same plan on a checkpoint in which the MTP layer's experts are the last layer's gives the same tensors."""
    folder, single = tmp_path / "source", tmp_path / "one-file" / "source"
    save(folder, kind, **LAYOUTS[layout])
    fused = LAYOUTS[layout].get("fused_mtp", LAYOUTS[layout].get("fused", False))
    save(single, kind, fused=fused)
    in_place_of_last(single, tmp_path / "swapped", kind)
    bound = recipe(registry, assign=HALF, router="additive")
    plans = run(folder, tmp_path / "out", bound, tokens(4, 16))
    assert len(plans[-1].assignment)
    result = tensors(tmp_path / "out")
    swapped = again(source(tmp_path / "swapped"), plans, bound, tmp_path / "expected")
    _, last, prefix, _ = KINDS[kind]
    expected = {prefix + name.removeprefix(last): t for name, t in swapped.items() if name.startswith(last)}
    routed = {name: t for name, t in expected.items() if is_routed(name)}
    assert {name for name in result if name.startswith(prefix) and is_routed(name)} == set(routed)
    assert all(torch.equal(result[name], t) and result[name].dtype == t.dtype for name, t in routed.items())


@every_kind
@every_layout
def test_the_rest_of_an_mtp_layer_and_the_model_do_not_change(
    tmp_path: Path, registry: Registry, kind: str, layout: str
):
    extra = save(tmp_path / "source", kind, **LAYOUTS[layout])
    save(tmp_path / "plain" / "source", kind, mtp=False, **LAYOUTS[layout])
    bound = recipe(registry, assign=HALF)
    plans = run(tmp_path / "source", tmp_path / "out", bound, tokens(4, 16))
    result = tensors(tmp_path / "out")
    without = again(source(tmp_path / "plain/source"), plans, bound, tmp_path / "without")
    assert all(torch.equal(result[name], t) for name, t in extra.items() if not is_routed(name))
    assert all(torch.equal(result[name], t) for name, t in without.items())
    assert (tmp_path / "out/config.json").read_bytes() == (tmp_path / "without/config.json").read_bytes()


def test_an_mtp_block_is_what_the_kernel_makes_of_its_tensors(tmp_path: Path, registry: Registry):
    extra = save(tmp_path / "source", "deepseek")
    bound = recipe(registry, assign=HALF, router="additive")
    plans = run(tmp_path / "source", tmp_path / "out", bound, tokens(4, 16))
    mlp = "model.layers.3.mlp"

    def stacked(part: str) -> Tensor:
        return torch.stack([extra[f"{mlp}.experts.{expert}.{part}_proj.weight"] for expert in range(8)])

    bank = ExpertBank(
        dims=source(tmp_path / "source").outline[1][-1].dims,
        gate=stacked("gate"),
        up=stacked("up"),
        down=stacked("down"),
        gate_bias=None,
        up_bias=None,
        down_bias=None,
        router=extra[f"{mlp}.gate.weight"],
        per_expert={"bias": extra[f"{mlp}.gate.e_score_correction_bias"]},
        act=lambda gate, up: gate,
    )
    expected = compress_layer(bank, plans[-1], bound.apply.merge, bound.apply.router, 24, bound.seed)
    result = tensors(tmp_path / "out")
    for expert in range(4):
        for part, values in (("gate", expected.gate), ("up", expected.up), ("down", expected.down)):
            assert values is not None
            assert torch.equal(result[f"{mlp}.experts.{expert}.{part}_proj.weight"], values[expert])
    assert torch.equal(result[f"{mlp}.gate.weight"], expected.router)
    assert torch.equal(result[f"{mlp}.gate.e_score_correction_bias"], expected.per_expert["bias"])


@every_kind
@every_layout
def test_a_dropped_mtp_layer_leaves_what_there_is_without_it(
    tmp_path: Path, registry: Registry, kind: str, layout: str
):
    save(tmp_path / "source", kind, **LAYOUTS[layout])
    save(tmp_path / "plain" / "source", kind, mtp=False, **LAYOUTS[layout])
    bound = recipe(registry, assign=HALF, mtp="drop")
    plans = run(tmp_path / "source", tmp_path / "out", bound, tokens(4, 16))
    without = again(source(tmp_path / "plain/source"), plans, bound, tmp_path / "without")
    result = tensors(tmp_path / "out")
    assert result.keys() == without.keys()
    assert all(torch.equal(result[name], t) for name, t in without.items())
    names = {file.name for file in (tmp_path / "without").iterdir()}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names
    for name in names - {"config.json", "model.safetensors.index.json"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    config = json.loads((tmp_path / "without/config.json").read_text())
    counts = {"num_nextn_predict_layers": 0} if kind == "deepseek" else {}
    assert json.loads((tmp_path / "out/config.json").read_text()) == config | counts


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"num_nextn_predict_layers": None, "num_mtp_layers": 1}, {"num_mtp_layers": 0}),
        ({"num_mtp_layers": 1}, {"num_nextn_predict_layers": 0, "num_mtp_layers": 0}),
        ({"num_nextn_predict_layers": None}, {"num_nextn_predict_layers": 0}),
        (
            {"mtp_config": {"num_mtp_modules": 1, "depth": 1}},
            {"num_nextn_predict_layers": 0, "mtp_config": {"num_mtp_modules": 0, "depth": 1}},
        ),
    ],
    ids=["an alias", "both spellings", "left to its default", "where the class does not look"],
)
def test_a_dropped_layer_is_not_counted_anywhere(
    tmp_path: Path, registry: Registry, fields: dict[str, Any], expected: dict[str, Any]
):
    save(tmp_path / "source", "deepseek")
    edit_config(tmp_path / "source", **fields)
    before = json.loads((tmp_path / "source/config.json").read_text())
    run(tmp_path / "source", tmp_path / "out", recipe(registry, mtp="drop"), tokens(4, 16))
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after == before | {"n_routed_experts": 4} | expected


def test_wider_experts_are_wider_in_mtp_layers_too(tmp_path: Path, registry: Registry):
    save(tmp_path / "source", "qwen")
    bound = recipe(registry, assign={**DERN, "quantile": 1.0}, merge="concatenate")
    run(tmp_path / "source", tmp_path / "out", bound, tokens(4, 16))
    width = source(tmp_path / "out").outline[1][0].dims.width
    assert width > 24
    result = tensors(tmp_path / "out")
    assert result["mtp.layers.0.mlp.experts.3.up_proj.weight"].shape == (width, 32)
    assert "mtp.layers.0.mlp.experts.4.up_proj.weight" not in result


def test_transformers_drafts_with_the_compressed_mtp_layer(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    """Its own MTP model loads it, and its output is that of the original layer without the dropped experts."""
    monkeypatch.setattr(DeepseekV3ForCausalLM, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.3\."])
    save(tmp_path / "source", "deepseek")
    plans = run(tmp_path / "source", tmp_path / "out", recipe(registry), tokens(4, 16))
    hidden, positions = torch.randn(1, 12, 32), torch.arange(12)[None]

    def outputs(folder: Path, dropped: list[int]) -> Tensor:
        main = AutoModelForCausalLM.from_pretrained(folder)
        mtp = MtpModel.from_pretrained(main).eval()
        gate = mtp.layers[0].mtp_block.mlp.gate
        gate.e_score_correction_bias[dropped] = -torch.inf
        with torch.no_grad():
            return mtp.forward_layer(0, hidden, positions, None, input_ids=tokens(1, 12))

    torch.testing.assert_close(
        outputs(tmp_path / "out", []), outputs(tmp_path / "source", plans[-1].dropped), rtol=1e-4, atol=1e-5
    )


def test_a_killed_run_does_not_do_an_mtp_layer_again(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    save(tmp_path / "source", "deepseek", shard="60KB")
    bound = recipe(registry, assign=HALF)
    plans = run(tmp_path / "source", tmp_path / "expected", bound, tokens(4, 16))
    done: list[int] = []

    def killed_at(number: int) -> Any:
        def work(*arguments: Any) -> Any:
            if len(done) == number:
                raise KeyboardInterrupt
            done.append(number)
            return compress_layer(*arguments)

        return work

    model, out = source(tmp_path / "source"), tmp_path / "out"
    monkeypatch.setattr(apply, "compress_layer", killed_at(2))
    with pytest.raises(KeyboardInterrupt):
        again(model, plans, bound, out)
    assert json.loads((out / JOURNAL).read_text())["done"] == [1, 2]
    monkeypatch.setattr(apply, "compress_layer", killed_at(99))
    monkeypatch.setattr(apply, "copy_other_files", killed_at(3))
    with pytest.raises(KeyboardInterrupt):
        again(model, plans, bound, out)
    assert json.loads((out / JOURNAL).read_text())["done"] == [1, 2, "model.layers.3.mlp"]
    monkeypatch.undo()
    monkeypatch.setattr(apply, "compress_layer", killed_at(3))
    again(model, plans, bound, out)
    expected = {file.name: file.read_bytes() for file in (tmp_path / "expected").iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir()} == expected


EXPERT = "model.layers.3.mlp.experts.5.up_proj.weight"
GATE = "model.layers.3.mlp.gate.weight"
BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "no router": ({GATE: None, "model.layers.3.mlp.gate.e_score_correction_bias": None}, "every expert and router"),
    "a bias less": ({"model.layers.3.mlp.gate.e_score_correction_bias": None}, "every expert and router"),
    "no shared expert": (
        {f"model.layers.3.mlp.shared_experts.{part}_proj.weight": None for part in ("gate", "up", "down")},
        "every expert and router",
    ),
    "an expert's tensor less": ({EXPERT: None}, "multi-token-prediction layers (model.layers.3.mlp) must be built as"),
    "an expert of another width": ({EXPERT: torch.zeros(20, 32)}, "multi-token-prediction layers (model.layers.3.mlp)"),
    "a router of fewer experts": ({GATE: torch.zeros(4, 32)}, "multi-token-prediction layers (model.layers.3.mlp)"),
    "experts elsewhere": ({"talker.layers.0.mlp.experts.0.up_proj.weight": torch.zeros(2)}, "every expert and router"),
    "an unknown router": ({"model.layers.3.mlp.router.weight": torch.zeros(8, 32)}, "every expert and router"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_explained_is_refused(tmp_path: Path, what: str):
    extra = save(tmp_path / "source", "deepseek", mtp=False)
    changes, sentence = BROKEN[what]
    add(tmp_path / "source", {name: t for name, t in (extra | changes).items() if t is not None})
    with pytest.raises(CheckpointError) as error:
        source(tmp_path / "source")
    assert sentence in str(error.value)
    assert str(error.value).startswith(f"{tmp_path / 'source'}: ")


def test_a_model_of_other_experts_beside_it_is_no_mtp_layer(tmp_path: Path):
    """The same tensors under a name that no MTP layer has."""
    extra = save(tmp_path / "source", "deepseek", mtp=False)
    add(tmp_path / "source", {name.replace("model.", "talker."): t for name, t in extra.items()})
    with pytest.raises(CheckpointError, match=r"Got 'talker\.layers\.3\.mlp\.experts\.0"):
        source(tmp_path / "source")


def test_layers_that_the_config_cuts_off_are_no_mtp_layers(tmp_path: Path):
    """They are behind the last layer too, but have nothing that the model's layers lack."""
    save(tmp_path / "source", "deepseek", mtp=False)
    edit_config(tmp_path / "source", num_hidden_layers=2)
    with pytest.raises(CheckpointError, match=r"Got 'model\.layers\.2\.mlp\.experts\.0"):
        source(tmp_path / "source")


@pytest.mark.parametrize("name", [EXPERT, "model.layers.3.enorm.weight"])
def test_mtp_weights_must_be_finite(tmp_path: Path, registry: Registry, name: str):
    extra = save(tmp_path / "source", "deepseek", mtp=False)
    extra[name].view(-1)[3] = torch.nan
    add(tmp_path / "source", extra)
    with pytest.raises(CheckpointError, match=f"Got NaN or infinity in '{name}' instead"):
        run(tmp_path / "source", tmp_path / "out", recipe(registry), tokens(4, 16))


def test_several_mtp_layers_each_keep_their_own_weights(tmp_path: Path, registry: Registry):
    extra = save(tmp_path / "source", "qwen")
    second = {name.replace("layers.0.", "layers.1."): -t for name, t in extra.items() if "layers.0." in name}
    add(tmp_path / "source", second)
    run(tmp_path / "source", tmp_path / "out", recipe(registry), tokens(4, 16))
    result = load_file(tmp_path / "out/model.safetensors")
    first = {name for name in result if name.startswith("mtp.layers.0.mlp.experts.")}
    assert len(first) == 12
    assert all(torch.equal(result[name.replace("layers.0.", "layers.1.")], -result[name]) for name in first)


def test_an_mtp_layer_without_experts_stays_or_goes(tmp_path: Path, registry: Registry):
    extra = save(tmp_path / "source", "qwen", mtp=False)
    dense = {name: t for name, t in extra.items() if ".mlp." not in name}
    add(tmp_path / "source", dense)
    run(tmp_path / "source", tmp_path / "kept", recipe(registry), tokens(4, 16))
    run(tmp_path / "source", tmp_path / "dropped", recipe(registry, mtp="drop"), tokens(4, 16))
    assert all(torch.equal(tensors(tmp_path / "kept")[name], t) for name, t in dense.items())
    assert not [name for name in tensors(tmp_path / "dropped") if name.startswith("mtp.")]


def test_a_model_without_mtp_layers_is_the_same_either_way(tmp_path: Path, registry: Registry):
    save(tmp_path / "source", "deepseek", mtp=False)
    for mtp in ("compress", "drop"):
        run(tmp_path / "source", tmp_path / mtp, recipe(registry, mtp=mtp), tokens(4, 16))
    compressed = {file.name: file.read_bytes() for file in (tmp_path / "compress").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "drop").iterdir()} == compressed
