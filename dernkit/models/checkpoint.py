"""A safetensors checkpoint on disk: where every tensor lies, read from the headers alone, and checked before use."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from dernkit.errors import CheckpointError
from dernkit.models.headers import TORCH_DTYPES, TensorEntry, check_index, read_header, read_index, unindexed


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
    weight_map = read_index(path)
    shards = tuple(sorted(set(weight_map.values()))) if weight_map is not None else unindexed(path)
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
        check_index(path, weight_map, tensors)
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


def _refuse_dtypes(path: Path, tensors: Mapping[str, TensorEntry]) -> None:
    for name, entry in tensors.items():
        if entry.dtype not in TORCH_DTYPES:
            raise CheckpointError(
                f"{path}: tensors must be {', '.join(TORCH_DTYPES)}. Got {entry.dtype} in '{name}' instead. "
                f"Dequantise to bf16 first."
            )
