"""Quantised checkpoints that are read as bfloat16: block-FP8 and MXFP4, with transformers' own decoders.

A scheme finds codes and scales among the stored tensors and says what they make; everything after that sees an ordinary
checkpoint. What is quantised is decided by the tensors, not by the config's lists of modules: codes without scales of
the right shape are refused, and so are scales without codes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from dernkit.errors import CheckpointError
from dernkit.models.checkpoint import Coded
from dernkit.models.headers import TensorEntry
from dernkit.sentences import shown

DTYPE = torch.bfloat16
KEY = "quantization_config"
_PACKED = 16
"""Bytes of 32 MXFP4 values, which share a scale."""


@dataclass(frozen=True, slots=True)
class BlockFp8:
    """``X`` of float8 (e4m3) with ``X_scale_inv``, a factor for each block of ``rows`` x ``columns``."""

    rows: int
    columns: int

    def __str__(self) -> str:
        return f"fp8 in blocks of {self.rows}x{self.columns}"

    def coded(self, path: Path, stored: Mapping[str, TensorEntry]) -> dict[str, Coded]:
        """The weights that codes and scales make, under the codes' own names.

        Raises:
            CheckpointError: codes without fitting scales, scales without codes, or neither.
        """
        found = {}
        for name, entry in stored.items():
            if name.endswith("_scale_inv"):
                _check(path, stored, name.removesuffix("_scale_inv"), ("F8_E4M3",), None, f"the codes of '{name}'")
            if entry.dtype == "F8_E4M3":
                if len(entry.shape) < 2:
                    raise CheckpointError(
                        f"{path}: F8_E4M3 tensors must be matrices. Got '{name}' of shape {list(entry.shape)} instead. "
                        f"Dequantise to bf16 first."
                    )
                *outer, rows, columns = entry.shape
                grid = (*outer, -(-rows // self.rows), -(-columns // self.columns))
                scales = f"{name}_scale_inv"
                _check(path, stored, scales, ("F32", "BF16", "F8_E8M0"), grid, f"the scales of '{name}'")
                decode = partial(_fp8, rows=self.rows, columns=self.columns)
                found[name] = Coded(name, scales, _entry(entry.shard, entry.shape), decode)
        return found or _nothing(path, self)


@dataclass(frozen=True, slots=True)
class Mxfp4:
    """Expert weights ``X`` as ``X_blocks`` [E, rows, groups, 16] and ``X_scales`` [E, rows, groups], both uint8.

    A byte holds two 4-bit floats (e2m1), low nibble first; a group of 32 shares a power of two. The weight is
    [E, 32 * groups, rows].
    """

    def __str__(self) -> str:
        return "mxfp4"

    def coded(self, path: Path, stored: Mapping[str, TensorEntry]) -> dict[str, Coded]:
        """The weights that blocks and scales make, under the names without these endings.

        Raises:
            CheckpointError: blocks without fitting scales, scales without blocks, or neither.
        """
        found = {}
        for part, entry in stored.items():
            name = part.removesuffix("_blocks").removesuffix("_scales")
            if part.endswith("_scales"):
                _check(path, stored, f"{name}_blocks", ("U8",), None, f"the blocks of '{part}'")
            elif part.endswith("_blocks"):
                _check(path, stored, part, ("U8",), (*entry.shape[:3], _PACKED), "packed weights")
                _check(path, stored, f"{name}_scales", ("U8",), entry.shape[:-1], f"the scales of '{part}'")
                if name in stored:
                    raise CheckpointError(
                        f"{path}: a weight must be stored once. Got both '{name}' and '{part}' instead. "
                        f"Download the checkpoint again."
                    )
                experts, rows, groups, _ = entry.shape
                shape = (experts, 2 * _PACKED * groups, rows)
                found[name] = Coded(part, f"{name}_scales", _entry(entry.shard, shape), _mxfp4)
        return found or _nothing(path, self)


Scheme = BlockFp8 | Mxfp4


def scheme_of(path: Path, config: Mapping[str, Any]) -> Scheme | None:
    """How the checkpoint is quantised by its config.json; None if it is not.

    Raises:
        CheckpointError: in a way that is not read.
    """
    schemes = [_scheme(path, declared) for _, declared in declarations(config)]
    if len(set(schemes)) > 1:
        raise CheckpointError(
            f"{path}: all parts must be quantised in one way. Got {' and '.join(map(str, schemes))} instead. "
            f"Dequantise to bf16 first."
        )
    return schemes[0] if schemes else None


def declarations(config: Mapping[str, Any], at: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Path and value of every quantisation that the config or a nested one declares."""
    for name, value in config.items():
        if name == KEY and value:
            yield (*at, name), value
        elif name != KEY and isinstance(value, Mapping):
            yield from declarations(value, (*at, name))


def _scheme(path: Path, declared: Any) -> Scheme:
    fields = declared if isinstance(declared, Mapping) else {}
    method, blocks = fields.get("quant_method"), fields.get("weight_block_size")
    if method == "mxfp4":
        return Mxfp4()
    got = shown(method) if method else f"a {KEY} without quant_method"
    if method == "fp8":
        match blocks:
            case [int(rows), int(columns)] if min(rows, columns) > 0:
                if fields.get("activation_scheme", "dynamic") == "dynamic":
                    return BlockFp8(rows, columns)
                got += f" with activation_scheme {shown(fields['activation_scheme'])}"
            case _:
                got += f" with weight_block_size {blocks}" if blocks else " without weight_block_size"
    raise CheckpointError(
        f"{path}: quantised weights must be block-FP8 (quant_method fp8 with weight_block_size) or MXFP4. Got {got} "
        f"instead. Dequantise to bf16 first."
    )


def refuse_quantised(model: Any) -> None:
    """Refuse a model in memory whose weights transformers keeps quantised.

    Raises:
        CheckpointError: they are.
    """
    config = getattr(model.config, KEY, None)
    if config or getattr(model, "is_quantized", False):
        method = config.get("quant_method") if isinstance(config, Mapping) else getattr(config, "quant_method", None)
        raise CheckpointError(
            f"{model.config.model_type}: weights in memory must be float32, bfloat16 or float16. Got "
            f"{shown(getattr(method, 'value', method) or 'unknown')} quantisation instead. Load the model with a "
            f"{KEY} that dequantises, or compress the checkpoint with `dernkit run`."
        )


def _entry(shard: str, shape: tuple[int, ...]) -> TensorEntry:
    return TensorEntry(shard, "BF16", shape, 0, torch.Size(shape).numel() * DTYPE.itemsize)


def _check(
    path: Path,
    stored: Mapping[str, TensorEntry],
    name: str,
    dtypes: tuple[str, ...],
    shape: tuple[int, ...] | None,
    what: str,
) -> None:
    """The tensor must be there, in one of the dtypes and, where it is known, in the shape."""
    entry = stored.get(name)
    if entry is None:
        got = "no such tensor"
    elif entry.dtype not in dtypes or shape not in (None, entry.shape):
        got = f"{entry.dtype} {list(entry.shape)} instead"
    else:
        return
    must = f"{' or '.join(dtypes)}{'' if shape is None else f' {list(shape)}'}"
    raise CheckpointError(f"{path}: '{name}' must be {what}, {must}. Got {got}. Download the checkpoint again.")


def _nothing(path: Path, scheme: Scheme) -> NoReturn:
    raise CheckpointError(
        f"{path}: weights must be quantised as {KEY} says ({scheme}). Got no quantised tensor instead. "
        f"Remove {KEY} from config.json, or download the checkpoint again."
    )


def _fp8(codes: Any, scales: Any, *, rows: int, columns: int) -> Tensor:
    """The product is taken in float32 and rounded once.

    transformers divides the matrix evenly by the scales and so takes shorter blocks where the last one is cut off: here
    it gets whole ones.
    """
    weight, factors = codes[...], scales[...]
    *outer, height, width = weight.shape
    full = (*outer, factors.shape[-2] * rows, factors.shape[-1] * columns)
    if full != weight.shape:
        padded = torch.zeros(full, dtype=weight.dtype)
        padded[..., :height, :width] = weight
        weight = padded
    names = {"x.weight": weight, "x.weight_scale_inv": factors}
    decoded = Fp8Dequantize(None).convert(names)["x.weight"][0]
    return decoded[..., :height, :width].to(DTYPE, memory_format=torch.contiguous_format)


def _mxfp4(blocks: Any, scales: Any) -> Tensor:
    """One expert after another, as the decoder takes several times the memory of its result."""
    experts, rows, groups, _ = blocks.get_shape()
    decoded = torch.empty(experts, 2 * _PACKED * groups, rows, dtype=DTYPE)
    for expert in range(experts):
        one = slice(expert, expert + 1)
        decoded[one] = convert_moe_packed_tensors(blocks[one], scales[one], dtype=DTYPE)
    return decoded
