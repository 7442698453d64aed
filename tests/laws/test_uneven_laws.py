"""Layers with different numbers of experts: what is written loads as what it is, or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import dernkit
from dernkit.api import ExpertBank, KeepLimits, LayerStats
from dernkit.errors import CheckpointError, RecipeError
from dernkit.gather import abilities, describe
from dernkit.models.padding import check_padding
from dernkit.recipe import Recipe
from dernkit.registry import Registry
from dernkit.stages.plan import check_keep
from dernkit.testing.checkpoints import save_tiny, tiny_model, tokens
from tests import families
from tests.laws.every_model import aligned, load, logits, masked, saved
from tests.laws.mtp_checkpoints import KINDS, in_place_of_last, is_routed
from tests.laws.mtp_checkpoints import save as save_mtp
from tests.laws.pipeline import DERN, carry_out, recipe, run, source, tensors
from tests.laws.test_every_family import DOZEN, REFUSED, TOKENS
from tests.unit.workbench import edit_config, edit_tensors, save_tokenizer

OWN_COUNT = {"zaya": "which looks into the config while it runs"}
"""Families that cannot be uneven, and why."""
PADDED = ("deepseek_v3", "glm4_moe", "gpt_oss", "minimax_m2", "afmoe", "nemotron_h")
"""Families whose routers have a bias that keeps experts away, in groups and without."""

every_uneven = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in (*DOZEN, "mixtral") else pytest.mark.families)
        for name in families.FAMILIES
        if name not in REFUSED and name not in OWN_COUNT
    ],
)


@dataclass(frozen=True)
class Falling:
    """All experts in the first layer, and fewer and fewer below."""

    name: ClassVar[str] = "falling"
    requires: ClassVar[frozenset[str]] = frozenset()
    needs_measures: ClassVar[bool] = True

    def measure(self, bank: ExpertBank, scores: Tensor, stats: LayerStats) -> Tensor:
        return torch.empty(0)

    def allocate(self, measures: Sequence[Tensor], keep: int | float, limits: Sequence[KeepLimits]) -> list[int]:
        falling = [limit.experts - limit.multiple * (1 + at) for at, limit in enumerate(limits)]
        return [
            max(count, -(-limit.smallest // limit.multiple) * limit.multiple) for count, limit in zip(falling, limits)
        ]


def uneven(registry: Registry, **how: Any) -> Recipe:
    bound = recipe(registry, **how)
    return replace(bound, plan=replace(bound.plan, budget=Falling()))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


@every_uneven
def test_uneven_pruning_is_a_masked_router(folder: Path, tmp_path: Path, registry: Registry, family: str):
    saved(folder, family)
    plans = run(folder, tmp_path / "out", uneven(registry, export="dernkit"), TOKENS)
    if len(plans) == 1:
        pytest.skip("one MoE layer")
    assert len({len(plan.kept) for plan in plans}) > 1
    original = load(family, folder)
    with masked(original, plans):
        expected = logits(original, family)
    found = logits(dernkit.load_model(tmp_path / "out", registry=registry), family)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        load(family, tmp_path / "out")


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "longcat_flash"])
@pytest.mark.parametrize("export", ["auto", "dernkit"])
def test_dern_with_different_counts_is_the_same_from_disk_and_in_memory(
    folder: Path, tmp_path: Path, registry: Registry, family: str, export: str
) -> None:
    saved(folder, family)
    bound = uneven(registry, assign={**DERN, "quantile": 0.5}, router="additive", export=export)
    plans = run(folder, tmp_path / "out", bound, TOKENS)
    assert len({len(plan.kept) for plan in plans}) > 1 and all(len(plan.assignment) for plan in plans)
    live = load(family, folder)
    dernkit.compress(live, bound, TOKENS.split(2), registry=registry)
    live.save_pretrained(tmp_path / "saved")
    for place in ("out", "saved"):
        _assert_same(live, dernkit.load_model(tmp_path / place, registry=registry), family)


def _assert_same(one: Any, other: Any, family: str) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert torch.equal(logits(aligned(one), family), logits(aligned(other), family))


@pytest.mark.parametrize("family", PADDED)
@pytest.mark.parametrize("groups", [1, 2])
def test_padding_changes_no_bit_of_the_logits(
    folder: Path, tmp_path: Path, registry: Registry, family: str, groups: int
) -> None:
    """Of 32 tokens: vectors of 16 numbers then have no rest, which torch rounds in another way. Between groups padding
    moves the router's rows, whose products torch may round in another way, too.
    """
    field = families.FAMILIES[family].groups
    if groups > 1 and field is None:
        pytest.skip("no groups")
    saved(folder, family, **({field: groups, "topk_group": 1} if field else {}))
    for export in ("padded", "dernkit"):
        run(folder, tmp_path / export, uneven(registry, export=export), TOKENS)
    padded, own = load(family, tmp_path / "padded"), dernkit.load_model(tmp_path / "dernkit", registry=registry)
    found, expected = (families.outputs(aligned(model), family, length=16) for model in (padded, own))
    assert torch.equal(found, expected) or groups > 1
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    counts = [describe(source(tmp_path / export))["experts_by_layer"] for export in ("padded", "dernkit")]
    assert counts[0] == [max(counts[1])] * len(counts[1]) and len(set(counts[1])) > 1
    assert sum(map(_bytes, tensors(tmp_path / "padded").values())) > sum(
        map(_bytes, tensors(tmp_path / "dernkit").values())
    )


def _bytes(tensor: Tensor) -> int:
    return tensor.nbytes


@pytest.mark.parametrize("family", PADDED)
def test_auto_pads_where_the_router_allows_it(folder: Path, tmp_path: Path, registry: Registry, family: str):
    saved(folder, family)
    for export in ("padded", "auto"):
        run(folder, tmp_path / export, uneven(registry, export=export), TOKENS)
    ours, theirs = (sorted((tmp_path / export).iterdir()) for export in ("padded", "auto"))
    assert [file.read_bytes() for file in ours] == [file.read_bytes() for file in theirs]


@pytest.mark.parametrize("collapse", [False, True], ids=["groups", "collapsed"])
def test_padding_lies_in_every_group(folder: Path, tmp_path: Path, registry: Registry, collapse: bool):
    saved(folder, "deepseek_v3")
    groups = "collapse" if collapse else "respect"
    plans = run(folder, tmp_path / "out", uneven(registry, export="padded", groups=groups), TOKENS)
    fewer = min(plans, key=lambda plan: len(plan.kept))
    bias = tensors(tmp_path / "out")[f"model.layers.{fewer.layer}.mlp.gate.e_score_correction_bias"]
    size = 1 if collapse else 2
    low = (bias < -1e29).view(size, -1)
    assert low.sum() == len(bias) - len(fewer.kept) and bool((low.sum(dim=1) == low.sum() // size).all())
    original = load("deepseek_v3", folder)
    if not collapse:
        with masked(original, plans):
            expected = logits(original, "deepseek_v3")
        found = logits(load("deepseek_v3", tmp_path / "out"), "deepseek_v3")
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "ernie4_5_moe", "longcat_flash"])
def test_padding_is_refused_where_a_router_minds_it(folder: Path, tmp_path: Path, registry: Registry, family: str):
    """No bias at all, or a softmax over all experts before the bias: what is never chosen still takes its share."""
    saved(folder, family)
    with pytest.raises(RecipeError) as caught:
        run(folder, tmp_path / "out", uneven(registry, export="padded"), TOKENS)
    assert str(caught.value).startswith("apply.export: 'padded' needs routers with a bias")
    assert "dernkit.load_model" in str(caught.value) and "uniform" in str(caught.value)
    assert not list((tmp_path / "out").iterdir())
    model = load(family, folder)
    before = logits(model, family)
    with pytest.raises(RecipeError, match=r"apply.export: 'padded' needs"):
        dernkit.compress(model, uneven(registry, export="padded"), TOKENS.split(2), registry=registry)
    assert torch.equal(logits(model, family), before)


def test_counts_of_their_own_are_refused_where_a_layer_reads_the_config(
    folder: Path, tmp_path: Path, registry: Registry
) -> None:
    saved(folder, "zaya")
    with pytest.raises(RecipeError, match=OWN_COUNT["zaya"]):
        run(folder, tmp_path / "out", uneven(registry), TOKENS)


def test_a_padding_expert_that_can_be_chosen_is_not_published(folder: Path, tmp_path: Path, registry: Registry):
    saved(folder, "glm4_moe")
    plans = run(folder, tmp_path / "out", uneven(registry, export="padded"), TOKENS)
    counts = [len(plan.kept) for plan in plans]
    check_padding(*source(tmp_path / "out").open(), counts)

    def lift(stored: dict[str, Tensor]) -> None:
        for name, tensor in stored.items():
            if name.endswith("e_score_correction_bias"):
                tensor.clamp_(min=0)

    edit_tensors(tmp_path / "out/model.safetensors", lift)
    with pytest.raises(CheckpointError, match="layer 2: padding experts must never be chosen"):
        check_padding(*source(tmp_path / "out").open(), counts)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize("fused", [False, True], ids=["published", "fused"])
def test_stock_transformers_refuses_what_only_dernkit_loads(
    folder: Path, tmp_path: Path, registry: Registry, family: str, fused: bool
) -> None:
    """In the published formats a missing expert is a missing tensor, with which transformers would go on."""
    save_tiny(folder, family, fused=fused)
    save_tokenizer(folder)
    run(folder, tmp_path / "out", uneven(registry, export="dernkit"), tokens(4, 16))
    (tmp_path / "out/tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    (tmp_path / "out/tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    for loader in (AutoModelForCausalLM, type(tiny_model(family))):
        with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
            loader.from_pretrained(tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"]
    model = dernkit.load_model(str(tmp_path / "out"), registry=registry)
    assert model.generate(tokens(1, 4), max_new_tokens=3, do_sample=False).shape == (1, 7)


def test_config_names_the_largest_count_and_every_layers_own(folder: Path, tmp_path: Path, registry: Registry):
    saved(folder, "mixtral")
    run(folder, tmp_path / "out", uneven(registry), TOKENS)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_local_experts"], config["dernkit_experts"]) == (7, [7, 6, 5])
    assert config | {"num_local_experts": 8} == json.loads((folder / "config.json").read_text()) | {
        "dernkit_experts": [7, 6, 5]
    }
    facts = describe(source(tmp_path / "out")) | abilities(source(tmp_path / "out"))
    assert (facts["experts"], facts["experts_by_layer"]) == (7, [7, 6, 5])
    assert facts["can"] == "load with dernkit.load_model, evaluate"


@pytest.mark.parametrize("counts", [[7, 6], [7, 6, 9], [7, 6, 0], [], "7", [7, 6, 5.0]])
def test_counts_that_do_not_fit_are_one_sentence(folder: Path, tmp_path: Path, registry: Registry, counts: Any):
    saved(folder, "mixtral")
    run(folder, tmp_path / "out", uneven(registry), TOKENS)
    edit_config(tmp_path / "out", dernkit_experts=counts)
    with pytest.raises(CheckpointError, match=r"config.json: 'dernkit_experts' must .*\. Got .* instead\."):
        dernkit.load_model(tmp_path / "out", registry=registry)
    edit_config(tmp_path / "out", dernkit_experts=[7, 5, 6])
    with pytest.raises(CheckpointError, match=r"must fit config\.json"):
        dernkit.load_model(tmp_path / "out", registry=registry)


def test_an_uneven_result_is_not_compressed_again(folder: Path, tmp_path: Path, registry: Registry):
    saved(folder, "mixtral")
    run(folder, tmp_path / "out", uneven(registry), TOKENS)
    with pytest.raises(CheckpointError, match="must have the same number of experts to be compressed"):
        check_keep(source(tmp_path / "out"), recipe(registry).plan)
    live = dernkit.load_model(tmp_path / "out", registry=registry)
    with pytest.raises(CheckpointError, match="all MoE layers must have one expert count"):
        dernkit.compress(live, recipe(registry), TOKENS.split(2), registry=registry)


@pytest.mark.parametrize("family", ["mixtral", "glm4_moe"])
def test_load_model_loads_ordinary_results_as_transformers_does(
    folder: Path, tmp_path: Path, registry: Registry, family: str
) -> None:
    saved(folder, family, dtype=torch.bfloat16)
    run(folder, tmp_path / "out", recipe(registry), TOKENS)
    ours, theirs = dernkit.load_model(tmp_path / "out", registry=registry), load(family, tmp_path / "out")
    assert not ours.training and ours.dtype == torch.bfloat16
    assert torch.equal(logits(ours, family), logits(theirs, family))


def test_tied_embeddings_and_bfloat16_are_kept(folder: Path, tmp_path: Path, registry: Registry):
    saved(folder, "mixtral", dtype=torch.bfloat16, tie_word_embeddings=True)
    run(folder, tmp_path / "out", uneven(registry), TOKENS)
    model = dernkit.load_model(tmp_path / "out", registry=registry)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert {tensor.dtype for tensor in model.parameters()} == {torch.bfloat16} and not model.training


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("export", ["auto", "dernkit"])
def test_an_mtp_block_has_the_count_of_the_last_one(tmp_path: Path, registry: Registry, kind: str, export: str):
    """As `test_mtp_laws` has it for equal counts, padding included."""
    folder = tmp_path / "source"
    save_mtp(folder, kind)
    in_place_of_last(folder, tmp_path / "swapped", kind)
    bound = uneven(registry, assign={**DERN, "quantile": 0.5}, router="additive", export=export)
    plans = run(folder, tmp_path / "out", bound, tokens(4, 16))
    assert len(plans[-1].kept) < len(plans[0].kept)
    carry_out(source(tmp_path / "swapped"), plans, bound, tmp_path / "expected")
    _, last, prefix, _ = KINDS[kind]
    result, swapped = tensors(tmp_path / "out"), tensors(tmp_path / "expected")
    expected = {prefix + name.removeprefix(last): t for name, t in swapped.items() if name.startswith(last)}
    routed = {name: t for name, t in expected.items() if is_routed(name)}
    assert {name for name in result if name.startswith(prefix) and is_routed(name)} == set(routed)
    assert routed and all(torch.equal(result[name], tensor) for name, tensor in routed.items())
    assert describe(source(tmp_path / "out"))["mtp_layers"]
    if export == "dernkit":
        model = dernkit.load_model(tmp_path / "out", registry=registry)
        assert model(tokens(1, 8)).logits.isfinite().all()
