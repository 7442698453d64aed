"""What the universal adapter says about routers, and what it refuses."""

from __future__ import annotations

import pytest
import transformers

from dernkit.errors import CheckpointError
from dernkit.memory import measured, peak_bytes
from dernkit.models.probe import build_on_meta
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.testing.checkpoints import FAMILIES, tiny_model

ROUTERS = {
    "mixtral": "softmax, top-k renormalised",
    "qwen2_moe": "softmax, top-k not renormalised",
    "qwen3_moe": "softmax, top-k renormalised",
    "olmoe": "softmax, top-k not renormalised",
    "deepseek_v2": "softmax, top-k not renormalised, scaled by 1.5",
    "deepseek_v2_groups": "softmax, top-k not renormalised",
    "deepseek_v3": "sigmoid, top-k renormalised, scaled by 2.5 + correction bias",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_router_is_described_by_what_it_does(family: str):
    block = find_blocks(tiny_model(family), [Universal()])[0]
    assert block.router_kind() == ROUTERS[family]


@pytest.mark.parametrize(
    ("family", "groups", "smallest"),
    [("mixtral", 1, 2), ("deepseek_v2", 1, 2), ("deepseek_v2_groups", 2, 4), ("deepseek_v3", 2, 4)],
)
def test_groups_set_the_smallest_keep(family: str, groups: int, smallest: int):
    dims = find_blocks(tiny_model(family), [Universal()])[0].dims
    assert (dims.groups, dims.smallest_keep) == (groups, smallest)


def test_dense_first_layers_are_left_alone():
    blocks = find_blocks(tiny_model("deepseek_v3"), [Universal()])
    assert [block.layer for block in blocks] == [1, 2]


def test_a_dense_model_is_refused():
    config = transformers.LlamaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    with pytest.raises(CheckpointError, match="llama: must be a Mixture-of-Experts model"):
        find_blocks(transformers.LlamaForCausalLM(config), [Universal()])


def test_a_model_of_any_size_is_understood_without_allocating_it():
    """DeepSeek-V3 as published: 671 billion parameters, 61 layers, 256 experts."""
    config = transformers.DeepseekV3Config()
    with measured() as cost:
        before = peak_bytes()
        blocks = find_blocks(build_on_meta(transformers.DeepseekV3ForCausalLM, config), [Universal()])
    assert (len(blocks), blocks[0].dims.experts, blocks[0].dims.groups) == (58, 256, 8)
    assert cost.peak_bytes - before < 2e9
