"""Safetensors out: the source's shards with some tensors replaced or left out, every other byte copied as it is.

Names, shard layout, tensor order and metadata are the source's; what a quantised source stores as codes and scales is
written decoded. All shapes are known before the first byte is written, so each output file is allocated whole (a full
disk is noticed at once) and tensors are put in place in any order.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dernkit.errors import CheckpointError
from dernkit.models.checkpoint import Checkpoint
from dernkit.models.headers import INDEX, SAFETENSORS_DTYPES, TensorEntry, read_header

_CHUNK = 16 * 2**20
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor to write: where it lies in the output, and whether its values are the source's."""

    entry: TensorEntry
    copied: bool


class ShardWriter:
    """Writes a checkpoint below ``folder``: `allocate`, `put` every replaced tensor, `copy_untouched`, `finish`.

    ``resumed`` says that all files of a killed run are there with the right layout; `allocate` then leaves them.

    Args:
        source: the checkpoint whose layout is followed.
        folder: an existing directory.
        replaced: name -> meta tensor with the new shape and dtype.
        removed: names to leave out.
    """

    def __init__(
        self, source: Checkpoint, folder: Path, replaced: Mapping[str, Tensor], removed: frozenset[str]
    ) -> None:
        self.source = source
        self.folder = folder
        self.outputs: dict[str, Output] = {}
        self._headers: dict[str, bytes] = {}
        stored = _by_shard(source.on_disk, source.on_disk)
        for shard, names in _by_shard(source.tensors, source.tensors).items():
            self._lay_out(shard, names, replaced, removed, stored.get(shard, []))
        self.resumed = all(self._is_laid_out(shard) for shard in self._headers)

    def allocate(self) -> None:
        """Make every file in its full size, with its header.

        Raises:
            CheckpointError: the disk has no room for all of them (none stays then).
        """
        if self.resumed:
            return
        try:
            for shard in self._headers:
                self._allocate(shard)
        except OSError as error:
            for shard in self._headers:
                (self.folder / shard).unlink(missing_ok=True)
            if error.errno not in _FULL:
                raise
            needed = sum(self._size(name) for name in self._headers)
            raise CheckpointError(
                f"{self.folder}: the disk must have room for {needed:,} bytes. Got '{error.strerror}' instead. "
                f"Free some space or choose another --out."
            ) from None

    @property
    def copied(self) -> list[str]:
        """Names of the tensors whose values are the source's."""
        return [name for name, output in self.outputs.items() if output.copied]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors of the output together."""
        return sum(output.entry.end - output.entry.start for output in self.outputs.values())

    def _lay_out(
        self,
        shard: str,
        names: list[str],
        replaced: Mapping[str, Tensor],
        removed: frozenset[str],
        stored: list[str],
    ) -> None:
        header: dict[str, object] = {}
        if self.source.metadata[shard]:
            header["__metadata__"] = dict(self.source.metadata[shard])
        at, entries, same = 0, {}, names == stored
        for name in names:
            entry = self.source.tensors[name]
            if name in removed:
                same = False
                continue
            dtype, shape, size = entry.dtype, entry.shape, entry.end - entry.start
            if name in replaced:
                new = replaced[name]
                dtype, shape = SAFETENSORS_DTYPES[new.dtype], tuple(new.shape)
                size = new.numel() * new.element_size()
                same = same and (dtype, shape) == (entry.dtype, entry.shape)
            same = same and name not in self.source.coded
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
            entries[name] = TensorEntry(shard, dtype, shape, at, at + size)
            at += size
        if not entries:
            return
        self._headers[shard] = _raw_header(self.source.path / shard) if same else _header(header)
        base = len(self._headers[shard])
        for name, entry in entries.items():
            moved = TensorEntry(shard, entry.dtype, entry.shape, base + entry.start, base + entry.end)
            self.outputs[name] = Output(moved, name not in replaced)

    def _size(self, shard: str) -> int:
        ends = [output.entry.end for output in self.outputs.values() if output.entry.shard == shard]
        return max(ends, default=len(self._headers[shard]))

    def _is_laid_out(self, shard: str) -> bool:
        file = self.folder / shard
        if not file.exists() or file.stat().st_size != self._size(shard):
            return False
        with file.open("rb") as stream:
            return stream.read(len(self._headers[shard])) == self._headers[shard]

    def _allocate(self, shard: str) -> None:
        with (self.folder / shard).open("wb") as stream:
            _reserve(stream.fileno(), self._size(shard))
            stream.write(self._headers[shard])

    def put(self, tensors: Mapping[str, Tensor]) -> None:
        """Write replaced tensors in place and flush them to the disk."""
        for shard, names in _by_shard(tensors, self.source.tensors).items():
            with (self.folder / shard).open("r+b") as stream:
                for name in names:
                    self._put_one(stream.fileno(), name, tensors[name])
                os.fsync(stream.fileno())

    def _put_one(self, descriptor: int, name: str, tensor: Tensor) -> None:
        entry = self.outputs[name].entry
        if tuple(tensor.shape) != entry.shape or SAFETENSORS_DTYPES[tensor.dtype] != entry.dtype:
            raise CheckpointError(
                f"{self.folder}: '{name}' must be {entry.dtype} {list(entry.shape)}. "
                f"Got {SAFETENSORS_DTYPES[tensor.dtype]} {list(tensor.shape)} instead. This is a bug of the adapter."
            )
        raw = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        _pwrite(descriptor, raw, entry.start)

    def copy_untouched(self) -> None:
        """Write every tensor that was not replaced: decoded, or else copied byte for byte."""
        for shard, names in _by_shard(self.copied, self.source.tensors).items():
            with (self.source.path / shard).open("rb") as old, (self.folder / shard).open("r+b") as new:
                for name in names:
                    if name in self.source.coded:
                        self._put_one(new.fileno(), name, self.source.read(name))
                    else:
                        self._copy_one(old.fileno(), new.fileno(), name)
                os.fsync(new.fileno())

    def _copy_one(self, old: int, new: int, name: str) -> None:
        source, target = self.source.tensors[name], self.outputs[name].entry
        at = source.start
        while at < source.end:
            raw = os.pread(old, min(_CHUNK, source.end - at), at)
            if not raw:
                raise CheckpointError(
                    f"{self.source.path / source.shard}: must stay the same while it is read. Got less of it instead."
                )
            _pwrite(new, memoryview(raw), target.start + at - source.start)
            at += len(raw)

    def finish(self) -> None:
        """Write the index (if the source has one) and check that every file is whole."""
        if self.source.indexed:
            (self.folder / INDEX).write_bytes(self._index().encode())
        for shard in self._headers:
            read_header(self.folder / shard)

    def _index(self) -> str:
        text = (self.source.path / INDEX).read_bytes().decode()
        index = json.loads(text)
        decoded = {part: name for name in self.source.coded for part in self.source.parts(name)}
        names = dict.fromkeys(decoded.get(part, part) for part in index["weight_map"])
        weight_map = {name: self.outputs[name].entry.shard for name in names if name in self.outputs}
        total = self.tensor_bytes
        if weight_map == index["weight_map"] and total == self.source.tensor_bytes:
            return text
        metadata = dict(index.get("metadata") or {})
        metadata["total_size"] = total
        if "total_parameters" in metadata:
            metadata["total_parameters"] = sum(
                torch.Size(output.entry.shape).numel() for output in self.outputs.values()
            )
        return json.dumps(index | {"metadata": metadata, "weight_map": weight_map}, indent=2) + "\n"


def _by_shard(names: Iterable[str], entries: Mapping[str, TensorEntry]) -> dict[str, list[str]]:
    shards: dict[str, list[str]] = {}
    for name in names:
        shards.setdefault(entries[name].shard, []).append(name)
    return shards


def _header(header: Mapping[str, object]) -> bytes:
    """As safetensors writes it: no spaces, padded to 8 bytes."""
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _raw_header(file: Path) -> bytes:
    """The bytes before the tensors, whoever wrote them."""
    with file.open("rb") as stream:
        length = stream.read(8)
        return length + stream.read(int.from_bytes(length, "little"))


def _reserve(descriptor: int, size: int) -> None:
    """Disk space for the whole file, where the system can promise it; elsewhere a full disk shows in `put`."""
    if sys.platform == "linux":
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _pwrite(descriptor: int, raw: memoryview, at: int) -> None:
    while raw:
        written = os.pwrite(descriptor, raw[:_CHUNK], at)
        raw, at = raw[written:], at + written
