"""Whole multimodal checkpoints, as they are published: the language model is compressed, everything else is copied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import dernkit
from dernkit.registry import Registry
from tests import families
from tests.laws.pipeline import DERN, recipe, run, tensors

_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 32}
_LAYERS = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28, "patch_size": 14}
_PROJECTED = {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}
MODELS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "Qwen3VLMoe": ("qwen3_vl_moe_text", "visual", {**_VISION, "deepstack_visual_indexes": [0]}),
    "Glm4vMoe": ("glm4v_moe_text", "visual", _VISION),
    "Qwen3_5Moe": ("qwen3_5_moe_text", "visual", _VISION),
    "Llama4": ("llama4_text", "vision", {**_LAYERS, **_PROJECTED, "intermediate_size": 128}),
    "Aria": ("aria_text", "vision", {**_LAYERS, "model_type": "idefics3_vision", "intermediate_size": 32}),
    "Gemma4": ("gemma4_text", "", None),
}
"""What the classes begin with -> the text model, what the vision part's tensors are called, and its config."""
TOKENS = torch.randint(3, families.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "Llama4" else pytest.mark.families) for name in MODELS]
)
def test_the_language_model_of_a_multimodal_checkpoint(name: str, tmp_path: Path, registry: Registry):
    text, vision, fields = MODELS[name]
    model = _saved(name, text, fields, tmp_path / "source")
    bound = recipe(registry, assign={**DERN, "quantile": 0.5}, router="additive")
    run(tmp_path / "source", tmp_path / "out", bound, TOKENS)
    reloaded, info = type(model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    live = type(model).from_pretrained(tmp_path / "source").eval()
    dernkit.compress(live, bound, TOKENS.split(2), registry=registry)
    with torch.no_grad():
        assert torch.equal(live(TOKENS).logits, reloaded.eval()(TOKENS).logits)
    before, after = tensors(tmp_path / "source"), tensors(tmp_path / "out")
    other = [key for key in before if vision and vision in key]
    assert bool(other) == bool(vision) and all(torch.equal(before[key], after[key]) for key in other)


def _saved(name: str, text: str, vision: dict[str, Any] | None, folder: Path) -> Any:
    config = families.make_config(text)
    whole = getattr(transformers, f"{name}Config")(text_config=config.to_dict(), vision_config=vision)
    if name == "Gemma4":
        whole.audio_config = None
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(whole).eval()
    families.randomise(model, config)
    model.save_pretrained(folder)
    return model
