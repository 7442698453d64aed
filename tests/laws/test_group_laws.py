"""Routers with groups: respected, or made one group, on whole checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import dernkit
from dernkit.errors import CheckpointError
from dernkit.models.groups import regrouped
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.registry import Registry
from dernkit.stages.plan import check_keep
from dernkit.testing.checkpoints import save_tiny, tiny_model, tokens
from dernkit.types import LayerPlan
from tests.laws.masking import masked_experts
from tests.laws.pipeline import DERN, recipe, run, source

FOUR = {"n_group": 4, "topk_group": 2}
GROUPED: dict[str, tuple[str, dict[str, Any]]] = {
    "maximum": ("deepseek_v2_groups", {}),
    "sum of two": ("deepseek_v3", {}),
    "maximum, four groups": ("deepseek_v2_groups", {"n_group": 4, "topk_group": 1}),
    "sum of two, four groups": ("deepseek_v3", FOUR),
}
every_router = pytest.mark.parametrize("router", GROUPED)
KEEP = 3
"""No multiple of the groups."""


def save(folder: Path, router: str, **fields: Any) -> Path:
    family, groups = GROUPED[router]
    save_tiny(folder, family, **{**groups, **fields})
    return folder


def group_sizes(plan: LayerPlan, groups: int) -> list[int]:
    return torch.bincount(plan.kept * groups // plan.experts, minlength=groups).tolist()


@every_router
def test_one_group_is_masking_with_the_group_limit_off(tmp_path: Path, registry: Registry, router: str):
    folder = save(tmp_path / "source", router)
    plans = run(folder, tmp_path / "out", recipe(registry, keep=KEEP, groups="collapse"), tokens(4, 16))
    groups = source(folder).outline[1][0].dims.groups
    assert all(len(set(group_sizes(plan, groups))) > 1 for plan in plans)
    compressed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    original = AutoModelForCausalLM.from_pretrained(folder, n_group=1, topk_group=1)
    limited = AutoModelForCausalLM.from_pretrained(folder)
    ids = tokens(2, 20, seed=5)
    with torch.no_grad(), masked_experts(original, plans), masked_experts(limited, plans):
        expected, other = original(ids).logits, limited(ids).logits
    with torch.no_grad():
        torch.testing.assert_close(compressed(ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(expected, other, rtol=1e-2, atol=1e-2)


@every_router
def test_one_group_on_disk_and_live_are_the_same_bits(tmp_path: Path, registry: Registry, router: str):
    folder, out = save(tmp_path / "source", router), tmp_path / "out"
    bound = recipe(registry, keep=KEEP, groups="collapse", assign={**DERN, "quantile": 0.5}, router="additive")
    run(folder, out, bound, tokens(4, 16))
    live = AutoModelForCausalLM.from_pretrained(folder)
    plans = dernkit.compress(live, bound, tokens(4, 16).split(2), registry=registry)
    assert all(plan.one_group for plan in plans)
    assert (live.config.n_group, live.config.topk_group, live.config.n_routed_experts) == (1, 1, KEEP)
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    for (name, mine), theirs in zip(live.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    ids = tokens(2, 20, seed=5)
    with torch.no_grad():
        assert torch.equal(live.eval()(ids).logits, reloaded(ids).logits)
    live.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")(ids).logits, live(ids).logits)


@every_router
def test_the_config_changes_in_its_count_and_its_groups(tmp_path: Path, registry: Registry, router: str):
    folder, out = save(tmp_path / "source", router), tmp_path / "out"
    run(folder, out, recipe(registry, keep=KEEP, groups="collapse"), tokens(4, 16))
    before, after = (json.loads((place / "config.json").read_text()) for place in (folder, out))
    assert after == before | {"n_routed_experts": KEEP, "n_group": 1, "topk_group": 1}


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v2"])
def test_a_model_without_groups_is_the_same_either_way(tmp_path: Path, registry: Registry, family: str):
    save_tiny(tmp_path / "source", family)
    for groups in ("respect", "collapse"):
        run(tmp_path / "source", tmp_path / groups, recipe(registry, groups=groups), tokens(4, 16))
    respected = {file.name: file.read_bytes() for file in (tmp_path / "respect").iterdir()}
    assert {file.name: file.read_bytes() for file in (tmp_path / "collapse").iterdir()} == respected


@every_router
def test_respected_groups_are_equal_and_the_smallest_keep_still_routes(tmp_path: Path, registry: Registry, router: str):
    folder, out = save(tmp_path / "source", router), tmp_path / "out"
    dims = source(folder).outline[1][0].dims
    plans = run(folder, out, recipe(registry, keep=dims.smallest_keep), tokens(4, 16))
    share = dims.smallest_keep // dims.groups
    assert all(group_sizes(plan, dims.groups) == [share] * dims.groups for plan in plans)
    chosen = []
    model = AutoModelForCausalLM.from_pretrained(out)
    for block in find_blocks(model, [Universal()]):
        block.on_routing(lambda inputs, experts, coefficients: chosen.append(experts))
    with torch.no_grad():
        model(tokens(4, 20, seed=5))
    used = [len(row.unique()) for experts in chosen for row in experts // share]
    assert used and max(used) <= dims.top_k_groups


def test_a_group_score_of_two_needs_two_experts_even_in_one_group(tmp_path: Path, registry: Registry):
    """With a top-k of 1 the sum of the best two still looks at two."""
    folder = save(tmp_path / "source", "sum of two", n_group=1, topk_group=1, num_experts_per_tok=1)
    assert source(folder).outline[1][0].dims.smallest_keep == 2
    with pytest.raises(CheckpointError, match="must be from 2"):
        run(folder, tmp_path / "none", recipe(registry, keep=1), tokens(4, 16))
    run(folder, tmp_path / "out", recipe(registry, keep=2), tokens(4, 16))
    with torch.no_grad():
        assert AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens(2, 20)).logits.isfinite().all()


@pytest.mark.parametrize("groups, legal", [("respect", [4, 6, 8]), ("collapse", [2, 3, 4, 5, 6, 7, 8])])
def test_what_may_be_kept_is_checked_before_anything_else(
    tmp_path: Path, registry: Registry, groups: str, legal: list[int]
):
    model, allowed = source(save(tmp_path / "source", "sum of two")), []
    for keep in range(1, 9):
        try:
            check_keep(model, recipe(registry, keep=keep, groups=groups).plan)
            allowed.append(keep)
        except CheckpointError as error:
            assert str(error).startswith("keep, layer 1: must be from")
    assert allowed == legal


def test_groups_that_no_config_field_sets_cannot_become_one():
    model = tiny_model("mixtral")
    blocks = find_blocks(model, [Universal()])
    for block in blocks:
        block.dims = replace(block.dims, groups=2, top_k_groups=1)
    with pytest.raises(CheckpointError) as error:
        regrouped(model, blocks, collapse=True)
    assert str(error.value) == (
        "mixtral: to collapse groups, exactly one config field must set the router's 'num_group' (2). "
        "Got none instead. Use 'groups: respect'."
    )
