"""Quantise a saved checkpoint in place, in the layouts that are published: for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_LARGEST_E4M3 = 448.0
_E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_NOT_CONVERTED = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "block_sparse_moe.gate.")
_INDEX = "model.safetensors.index.json"


def quantise_fp8(folder: Path, rows: int, columns: int, *, scales: torch.dtype = torch.float32) -> None:
    """As DeepSeek-V3 and its kind: all matrices but embeddings, head and router become e4m3 with a scale per block."""

    def quantised(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if tensor.ndim < 2 or any(part in name for part in _NOT_CONVERTED):
            return {name: tensor}
        codes, factors = fp8_blocks(tensor, rows, columns, scales)
        return {name: codes, f"{name}_scale_inv": factors}

    _rewrite(folder, quantised)
    fields = {"activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [rows, columns]}
    _declare(folder, {**fields, "quant_method": "fp8"})


def quantise_mxfp4(folder: Path) -> None:
    """As gpt-oss: the experts' matrices become blocks and scales, everything else stays."""

    def quantised(name: str, tensor: Tensor) -> dict[str, Tensor]:
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: tensor}
        blocks, scales = mxfp4_blocks(tensor)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}

    _rewrite(folder, quantised)
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _declare(folder, {"modules_to_not_convert": kept, "quant_method": "mxfp4"})


def fp8_blocks(weight: Tensor, rows: int, columns: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """[m, n] -> e4m3 [m, n] and scales [ceil(m / rows), ceil(n / columns)] of ``dtype``; the last blocks may be cut."""
    height, width = weight.shape
    grid = torch.zeros(-(-height // rows), -(-width // columns), dtype=dtype)
    codes = torch.zeros(height, width, dtype=torch.float8_e4m3fn)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            place = (slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns))
            block = weight[place].float()
            grid[i, j] = (block.abs().max() / _LARGEST_E4M3).clamp(min=2.0**-100)
            codes[place] = (block / grid[i, j].float()).clamp(-_LARGEST_E4M3, _LARGEST_E4M3).to(codes.dtype)
    return codes, grid


def mxfp4_blocks(weight: Tensor) -> tuple[Tensor, Tensor]:
    """[E, inputs, rows] -> uint8 blocks [E, rows, inputs / 32, 16] and uint8 scales [E, rows, inputs / 32]."""
    groups = weight.float().transpose(1, 2).unflatten(-1, (-1, 32))
    exponent = groups.abs().amax(-1).clamp(min=2.0**-100).log2().floor() - 2  # the largest e2m1 is 1.5 times 2 to the 2
    scaled = groups / exponent.exp2()[..., None]
    nearest = (scaled.abs()[..., None] - _E2M1).abs().argmin(-1)
    codes = (nearest + 8 * (scaled < 0)).to(torch.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, (exponent + 127).to(torch.uint8)


def _rewrite(folder: Path, change: Callable[[str, Tensor], dict[str, Tensor]]) -> None:
    weight_map: dict[str, str] = {}
    size = 0
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            metadata, old = stored.metadata(), {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        new = {key: value for name, tensor in old.items() for key, value in change(name, tensor).items()}
        save_file(new, file, metadata=metadata)
        weight_map |= dict.fromkeys(new, file.name)
        size += sum(tensor.nbytes for tensor in new.values())
    if (folder / _INDEX).exists():
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _declare(folder: Path, quantisation: dict[str, object]) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = quantisation
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
