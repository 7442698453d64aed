"""Tiny checkpoints with a multi-token-prediction (MTP) layer, as DeepSeek and Qwen publish them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from dernkit.models.headers import INDEX, SINGLE
from dernkit.testing.checkpoints import VOCABULARY, tiny_model

HIDDEN = 32
LAYOUTS: dict[str, dict[str, Any]] = {
    "one-file": {},
    "shards": {"shard": "60KB"},
    "fused": {"fused": True},
    "fused but for MTP": {"fused": True, "fused_mtp": False},
}


def _deepseek() -> Any:
    return tiny_model("deepseek_v3", num_nextn_predict_layers=1)


def _qwen() -> Any:
    config = Qwen3NextConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        linear_num_value_heads=4,
        linear_num_key_heads=2,
        linear_key_head_dim=16,
        linear_value_head_dim=16,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=20,
        intermediate_size=56,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = Qwen3NextForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2 or parameter.ndim == 3:
                parameter.copy_(0.2 * torch.randn(parameter.shape))
    return model


SQUARE = {name: (HIDDEN,) for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight")}
TABLES = {name: (VOCABULARY, HIDDEN) for name in ("embed_tokens.weight", "shared_head.head.weight")}
KINDS: dict[str, tuple[Callable[[], Any], str, str, dict[str, tuple[int, ...]]]] = {
    "deepseek": (
        _deepseek,
        "model.layers.2.",
        "model.layers.3.",
        {f"model.layers.3.{name}": shape for name, shape in (SQUARE | TABLES).items()}
        | {"model.layers.3.eh_proj.weight": (HIDDEN, 2 * HIDDEN)},
    ),
    "qwen": (
        _qwen,
        "model.layers.3.",
        "mtp.layers.0.",
        {f"mtp.{name}.weight": (HIDDEN,) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")}
        | {"mtp.fc.weight": (HIDDEN, 2 * HIDDEN)},
    ),
}
"""Name -> (model, prefix of its last layer, prefix of the MTP layer, what else belongs to that)."""


def is_routed(name: str) -> bool:
    """Whether surgery touches a tensor."""
    return ".experts." in name or name.endswith(("mlp.gate.weight", "mlp.gate.e_score_correction_bias"))


def save(
    folder: Path, kind: str, *, mtp: bool = True, shard: str = "5GB", fused: bool = False, fused_mtp: bool | None = None
) -> dict[str, Tensor]:
    """Save a checkpoint, with an MTP layer or without; returns the tensors of that layer."""
    build, _, _, _ = KINDS[kind]
    model = build()
    model.save_pretrained(folder, save_original_format=not fused, max_shard_size=shard)
    extra = mtp_tensors(model, kind, folder.parent / "spelling", fused=fused if fused_mtp is None else fused_mtp)
    if mtp:
        add(folder, extra)
    return extra


def mtp_tensors(model: Any, kind: str, scratch: Path, *, fused: bool) -> dict[str, Tensor]:
    """Random tensors of an MTP layer, spelled like the model's last layer."""
    _, last, prefix, others = KINDS[kind]
    model.save_pretrained(scratch, save_original_format=not fused)
    rng = torch.Generator().manual_seed(7)
    shapes = {prefix + k.removeprefix(last): v for k, v in load_file(scratch / SINGLE).items() if k.startswith(last)}
    tensors = {name: 0.2 * torch.randn(like.shape, generator=rng).to(like.dtype) for name, like in shapes.items()}
    return tensors | {name: torch.randn(shape, generator=rng) for name, shape in others.items()}


def add(folder: Path, extra: dict[str, Tensor]) -> None:
    """Put tensors into a checkpoint: into its one file, or as a shard of their own."""
    index = folder / INDEX
    if not index.exists():
        save_file(load_file(folder / SINGLE) | extra, folder / SINGLE, metadata={"format": "pt"})
        return
    save_file(extra, folder / "model-mtp.safetensors", metadata={"format": "pt"})
    data = json.loads(index.read_text())
    data["weight_map"] |= dict.fromkeys(extra, "model-mtp.safetensors")
    data["metadata"]["total_size"] += sum(tensor.nbytes for tensor in extra.values())
    index.write_text(json.dumps(data))


def in_place_of_last(folder: Path, out: Path, kind: str) -> None:
    """A checkpoint without the MTP layer, whose MoE block is in the place of the last one."""
    _, last, prefix, _ = KINDS[kind]
    tensors = load_file(folder / SINGLE)
    twins = {last + name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    replaced = {name: twins[name] if name in twins and is_routed(name) else t for name, t in tensors.items()}
    out.mkdir()
    (out / "config.json").write_bytes((folder / "config.json").read_bytes())
    root = prefix if kind == "deepseek" else "mtp."
    kept = {name: t for name, t in replaced.items() if not name.startswith(root)}
    save_file(kept, out / SINGLE, metadata={"format": "pt"})
