"""Experts that lie transposed on disk, as those of published Qwen3-VL-MoE models, go back as they came."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

from dernkit.errors import CheckpointError
from dernkit.registry import Registry
from dernkit.testing.checkpoints import tokens
from tests.laws.pipeline import DERN, recipe, run, tensors

RECIPES: dict[str, dict[str, Any]] = {
    "everything kept": {"keep": 1.0},
    "pruned": {},
    "DERN": {"assign": {**DERN, "quantile": 0.5}, "router": "additive"},
    "wider": {"assign": {**DERN, "quantile": 1.0}, "merge": "concatenate"},
}


def make(folder: Path, hidden: int) -> Path:
    """A tiny model of the family in transformers' own layout."""
    text = {
        "vocab_size": 96,
        "hidden_size": hidden,
        "intermediate_size": 56,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
    }
    vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "patch_size": 8}
    vision |= {"out_hidden_size": hidden, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    torch.manual_seed(0)
    Qwen3VLMoeForConditionalGeneration(Qwen3VLMoeConfig(text_config=text, vision_config=vision)).save_pretrained(folder)
    return folder


def turned(found: dict[str, Tensor]) -> dict[str, Tensor]:
    """All expert matrices the other way round."""
    return {
        name: tensor.transpose(1, 2).contiguous() if ".experts." in name else tensor for name, tensor in found.items()
    }


def published(folder: Path, made: Path) -> Path:
    """The same model in the layout in which the family was published."""
    folder.mkdir()
    (folder / "config.json").write_bytes((made / "config.json").read_bytes())
    save_file(turned(tensors(made)), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("kind", RECIPES)
def test_both_layouts_give_the_same_result_in_their_own_layout(tmp_path: Path, registry: Registry, kind: str) -> None:
    own = make(tmp_path / "own", hidden=32)
    bound = recipe(registry, **RECIPES[kind])
    plans = run(own, tmp_path / "own-out", bound, tokens(4, 16))
    run(published(tmp_path / "hub", own), tmp_path / "hub-out", bound, tokens(4, 16))
    expected, found = tensors(tmp_path / "own-out"), turned(tensors(tmp_path / "hub-out"))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert any(len(plan.assignment) for plan in plans) == ("assign" in RECIPES[kind])
    load = Qwen3VLMoeForConditionalGeneration.from_pretrained
    models = [load(tmp_path / folder, dtype=torch.float32).eval() for folder in ("own-out", "hub-out")]
    with torch.no_grad():
        mine, theirs = (model(tokens(2, 20, seed=5)).logits for model in models)
    assert torch.equal(mine, theirs)


def test_a_square_result_is_refused_only_where_it_could_be_taken_for_the_other_layout(
    tmp_path: Path, registry: Registry
) -> None:
    own = make(tmp_path / "own", hidden=128)  # 24 neurons grow to 64, gate and up together to 128
    bound = recipe(registry, **RECIPES["wider"])
    run(own, tmp_path / "own-out", bound, tokens(4, 16))
    with pytest.raises(CheckpointError, match=r"gate_up_proj: must not be square.+Got \[4, 128, 128\] instead\."):
        run(published(tmp_path / "hub", own), tmp_path / "hub-out", bound, tokens(4, 16))
