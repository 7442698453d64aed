"""A safetensors checkpoint on disk: where every tensor lies, read from the headers alone, and checked before use."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

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


@dataclass(frozen=True, slots=True)
class Coded:
    """A tensor that two stored ones make, codes and scales."""

    codes: str
    scales: str
    entry: TensorEntry
    """What it is read as; its byte range begins at 0, as no file holds it."""
    decode: Callable[[Any, Any], Tensor]
    """Slices of codes and scales -> the whole tensor."""


Coding = Callable[[Path, Mapping[str, TensorEntry]], Mapping[str, Coded]]
"""Path and stored tensors of a checkpoint -> those that are read decoded, by the names that they are read under."""


@dataclass(frozen=True, slots=True)
class _Decoded:
    """The slice of a coded tensor: decoded when it is indexed."""

    decode: Callable[[Any, Any], Tensor]
    codes: Any
    scales: Any

    def __getitem__(self, index: Any) -> Tensor:
        return self.decode(self.codes, self.scales)[index]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """All tensors of a checkpoint directory, by the names that they are read under, in file order."""

    path: Path
    shards: tuple[str, ...]
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, Mapping[str, str]]
    """Shard -> the ``__metadata__`` of its header."""
    indexed: bool
    on_disk: Mapping[str, TensorEntry]
    """What lies on the disk: the same tensors, but codes and scales in place of what they make."""
    coded: Mapping[str, Coded]
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Name in ``tensors`` -> name in the file, where they differ."""

    def stored(self, name: str) -> str:
        """The name of a tensor in its file."""
        return self.aliases.get(name, name)

    def with_others_in_place(self, replaced: Iterable[str], aliases: Mapping[str, str]) -> Checkpoint:
        """The same checkpoint without the tensors ``replaced``, and with others under their names (alias -> tensor)."""
        gone = set(replaced)
        kept = {name: entry for name, entry in self.tensors.items() if name not in gone}
        others = {alias: self.tensors[name] for alias, name in aliases.items()}
        return replace(self, tensors=kept | others, aliases=aliases)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors on the disk together, headers left out."""
        return sum(entry.end - entry.start for entry in self.on_disk.values())

    def parts(self, name: str) -> tuple[str, ...]:
        """The stored tensors that make the tensor ``name``."""
        name = self.stored(name)
        how = self.coded.get(name)
        return (how.codes, how.scales) if how else (name,)

    @contextmanager
    def slices(self, names: list[str]) -> Iterator[dict[str, Any]]:
        """Lazy slices of ``names`` (safetensors' own, or decoded ones); valid inside the ``with`` block."""
        parts = {name: self.parts(name) for name in names}
        shards = {self.on_disk[part].shard for found in parts.values() for part in found}
        files = {shard: safe_open(self.path / shard, "pt") for shard in shards}

        def lazy(name: str) -> Any:
            found = [files[self.on_disk[part].shard].get_slice(part) for part in parts[name]]
            how = self.coded.get(self.stored(name))
            return _Decoded(how.decode, *found) if how else found[0]

        try:
            yield {name: lazy(name) for name in names}
        finally:
            for file in files.values():
                file.__exit__(None, None, None)

    def read(self, name: str) -> Tensor:
        """One whole tensor, in its dtype on disk or decoded."""
        with self.slices([name]) as slices:
            return slices[name][...]


def open_checkpoint(path: Path, coding: Coding | None = None) -> Checkpoint:
    """Read all headers below ``path`` and check that index, shards and sizes agree.

    Args:
        path: the directory.
        coding: finds the tensors of a quantised checkpoint that are decoded when they are read.

    Raises:
        CheckpointError: no safetensors; a shard that is missing, truncated or damaged; a tensor that two shards hold,
            that the index promises and no shard holds, or of a dtype that is not read.
    """
    if not path.is_dir():
        raise CheckpointError(f"{path}: must be a directory with config.json and *.safetensors. Got no such directory.")
    weight_map = _read_index(path)
    shards = tuple(sorted(set(weight_map.values()))) if weight_map is not None else _unindexed(path)
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, Mapping[str, str]] = {}
    for shard in shards:
        entries, metadata[shard] = read_header(path / shard)
        for name, entry in entries.items():
            if name in tensors:
                raise CheckpointError(
                    f"{path}: every tensor must lie in one shard. Got '{name}' in both {tensors[name].shard} and "
                    f"{shard} instead. Remove one of them."
                )
            tensors[name] = entry
    if weight_map is not None:
        _check_index(path, weight_map, tensors)
    coded = coding(path, tensors) if coding else {}
    read = _as_read(tensors, coded)
    _refuse_dtypes(path, read)
    return Checkpoint(path, shards, read, metadata, weight_map is not None, tensors, coded)


def _as_read(stored: Mapping[str, TensorEntry], coded: Mapping[str, Coded]) -> dict[str, TensorEntry]:
    """Decoded tensors in the places of their codes, scales left out."""
    names = {item.codes: name for name, item in coded.items()}
    scales = {item.scales for item in coded.values()}
    return {
        names.get(part, part): coded[names[part]].entry if part in names else entry
        for part, entry in stored.items()
        if part not in scales
    }


def _read_index(path: Path) -> dict[str, str] | None:
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


def _unindexed(path: Path) -> tuple[str, ...]:
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


def _refuse_dtypes(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    for name, entry in tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{path}: tensors must be {', '.join(TORCH_DTYPES)}. Got {entry.dtype} in '{name}' instead. "
                f"Dequantise to bf16 first."
            )


def _truncated(file: Path, expected: int, size: int) -> str:
    return f"{file}: must have {expected} bytes by its own header. Got {size} instead. Download it again."


def _check_index(path: Path, weight_map: Mapping[str, str], tensors: Mapping[str, TensorEntry]) -> None:
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
