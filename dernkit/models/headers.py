"""What lies where on the disk: headers of safetensors files and the index of their shards, checked before use."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from dernkit.errors import CheckpointError
from dernkit.sentences import reason

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

TORCH_DTYPES: Mapping[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
SAFETENSORS_DTYPES: Mapping[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a shard: dtype in safetensors' spelling, shape, and byte range in the file."""

    shard: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> tuple[dict[str, TensorEntry], Mapping[str, str]]:
    """Entries (in byte order) and metadata of one safetensors file; the size is checked against the header."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > size - 8:
                raise CheckpointError(_truncated(file, length + 8, size))
            header = json.loads(stream.read(length))
        metadata = header.pop("__metadata__", {})
        entries = _entries(file.name, header, base=8 + length)
        expected = max((entry.end for entry in entries.values()), default=8 + length)
        if size != expected:
            raise CheckpointError(_truncated(file, expected, size))
        with safe_open(file, "pt"):  # safetensors' own checks: no holes, no overlaps, bytes that fit the shape
            return entries, metadata
    except FileNotFoundError:
        raise CheckpointError(
            f"{file}: must exist, the index names it. Got no such file instead. Download the shard."
        ) from None
    except OSError as error:
        raise CheckpointError(f"{file}: must be a file that can be read. Got '{error.strerror}' instead.") from None
    except (ValueError, TypeError, KeyError, AttributeError, SafetensorError):
        raise CheckpointError(
            f"{file}: must be a safetensors file. Got a damaged header instead. Download it again."
        ) from None


def _entries(shard: str, header: Mapping[str, Any], base: int) -> dict[str, TensorEntry]:
    entries = {}
    for name, item in sorted(header.items(), key=lambda pair: pair[1]["data_offsets"]):
        start, end = item["data_offsets"]
        entries[name] = TensorEntry(shard, item["dtype"], tuple(item["shape"]), base + start, base + end)
    return entries


def _truncated(file: Path, expected: int, size: int) -> str:
    return f"{file}: must have {expected} bytes by its own header. Got {size} instead. Download it again."


def read_index(path: Path) -> dict[str, str] | None:
    file = path / INDEX
    if not file.exists():
        return None
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
        shards = {str(name): str(shard) for name, shard in weight_map.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{file}: must be JSON with a 'weight_map' of tensor to shard. Got '{reason(error)}' instead. "
            f"Download it again."
        ) from None
    _refuse_shards(path, set(shards.values()))
    return shards


def _refuse_shards(path: Path, shards: Iterable[str]) -> None:
    """Names that would lead out of the directory, here and in the result, and a second checkpoint beside the first."""
    for shard in sorted(shards):
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path / INDEX}: shards must be *.safetensors files beside it. Got '{shard}' instead. "
                f"Download the index again."
            )
    if SINGLE not in shards and (path / SINGLE).exists():
        raise CheckpointError(
            f"{path}: must hold one checkpoint. Got {SINGLE} and an index of other shards instead. Remove one of them."
        )


def unindexed(path: Path) -> tuple[str, ...]:
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if SINGLE in found:
        return (SINGLE,)
    if found:
        raise CheckpointError(
            f"{path}: a checkpoint of several shards must have {INDEX}. Got {len(found)} *.safetensors files "
            f"without it instead. Download it."
        )
    others = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for file in path.glob(pattern))
    instead = f"only {others[0]}" if others else "none"
    raise CheckpointError(
        f"{path}: must hold {SINGLE} or shards with {INDEX}. Got {instead} instead. "
        f"Convert it with transformers' `save_pretrained`."
    )


def check_index(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
    for name, shard in weight_map.items():
        if name not in tensors or tensors[name].shard != shard:
            raise CheckpointError(
                f"{path / INDEX}: every tensor it names must lie in the shard it names. Got '{name}', which "
                f"{shard} does not hold, instead. Download the index and that shard again."
            )
    for name, entry in tensors.items():
        if name not in weight_map:
            raise CheckpointError(
                f"{path / INDEX}: must name every tensor of the shards. Got no entry for '{name}' of {entry.shard} "
                f"instead. Download the index again."
            )
