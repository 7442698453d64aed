"""The published config: what it becomes, and a checkpoint of its full size, as far as its headers."""

import json
import math
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from dernkit_deepseek_moe.configuration import DeepseekConfig
from dernkit_deepseek_moe.modeling import DeepseekForCausalLM
from dernkit_deepseek_moe.testing import PUBLISHED
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM

from dernkit.cli import main

LAYERS, HIDDEN, VOCABULARY, EXPERTS = 28, 2048, 102400, 64


def published_tensors() -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of the 16B checkpoint."""
    shapes = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    shapes["model.norm.weight"] = (HIDDEN,)
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        shapes |= {f"{prefix}.self_attn.{part}_proj.weight": (HIDDEN, HIDDEN) for part in "qkvo"}
        networks = {"mlp": 10944}
        if layer:
            networks = {f"mlp.experts.{expert}": 1408 for expert in range(EXPERTS)} | {"mlp.shared_experts": 2816}
            shapes[f"{prefix}.mlp.gate.weight"] = (EXPERTS, HIDDEN)
        for network, width in networks.items():
            shapes |= {f"{prefix}.{network}.{part}_proj.weight": (width, HIDDEN) for part in ("gate", "up")}
            shapes[f"{prefix}.{network}.down_proj.weight"] = (HIDDEN, width)
    return shapes


def save_headers(folder: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """A checkpoint of bfloat16 zeros that takes no room: headers and holes. Returns the bytes of its tensors.

    One file per layer, as to open one safetensors reserves address space for all of it.
    """
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(PUBLISHED))
    shards: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, shape in shapes.items():
        number = name.split(".")[2] if name.startswith("model.layers.") else "rest"
        shards.setdefault(f"model-{number}.safetensors", {})[name] = shape
    index = {name: file for file, names in shards.items() for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return sum(save_header(folder / file, names) for file, names in shards.items())


def save_header(file: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """One file of it."""
    header, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + end)
    return end


def test_a_checkpoint_of_the_published_size_is_understood(tmp_path: Path) -> None:
    size = save_headers(tmp_path / "model", published_tensors())
    result = CliRunner().invoke(main, ["inspect", "--json", str(tmp_path / "model")])
    assert result.exit_code == 0, result.output
    facts = json.loads(result.stdout)
    expected = {
        "family": "deepseek",
        "moe_layers": 27,
        "layers": list(range(1, 28)),
        "experts": 64,
        "top_k": 6,
        "width": 1408,
        "hidden": 2048,
        "groups": 1,
        "smallest_keep": 6,
        "router": "softmax, top-k not renormalised",
        "parameters": 16_375_728_128,
        "bytes": size,
    }
    assert {key: facts[key] for key in expected} == expected


def test_the_fields_of_the_published_config_are_understood(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**PUBLISHED, "rope_theta": 12345}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is DeepseekConfig
    assert config.rope_parameters == {"rope_theta": 12345, "rope_type": "default"}
    assert [config.has_experts(layer) for layer in range(3)] == [False, True, True]
    assert (config.head_dim, config.dtype.itemsize) == (128, 2)


@pytest.mark.parametrize("fields", [{"scoring_func": "sigmoid"}, {"num_experts_per_tok": None}])
def test_routing_that_the_model_does_not_have_is_refused(fields: dict) -> None:
    with pytest.raises(Exception, match=next(iter(fields))):
        DeepseekConfig(**{**PUBLISHED, **fields})


def test_a_model_without_shared_experts_and_one_with_experts_in_every_second_layer() -> None:
    fields = {"hidden_size": 16, "intermediate_size": 24, "moe_intermediate_size": 8, "vocab_size": 32}
    small = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 4, "n_routed_experts": 4}
    changed = {"n_shared_experts": None, "moe_layer_freq": 2, "num_experts_per_tok": 2}
    model = DeepseekForCausalLM(DeepseekConfig(**{**PUBLISHED, **fields, **small, **changed}))
    assert [hasattr(layer.mlp, "experts") for layer in model.model.layers] == [False, False, True, False]
    assert not hasattr(model.model.layers[2].mlp, "shared_experts")


def test_a_llama_of_the_same_process_is_in_nobodys_way() -> None:
    fields = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**fields, vocab_size=32))
    assert not llama._can_set_experts_implementation()
    more = {"moe_intermediate_size": 8, "vocab_size": 32, "n_routed_experts": 8, "num_key_value_heads": 2}
    model = DeepseekForCausalLM(DeepseekConfig(**{**PUBLISHED, **fields, **more}))
    model.set_experts_implementation("eager")
    assert model.config._experts_implementation == "eager"


def test_to_list_the_plugin_imports_no_transformers() -> None:
    code = (
        "import sys; from dernkit.registry import Registry; found = Registry.load().names('architecture'); "
        "sys.exit('transformers' in sys.modules or 'deepseek' not in found)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
