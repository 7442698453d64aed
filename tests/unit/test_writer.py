"""The writer: the source's shards with some tensors replaced or left out, every other byte as it is."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dernkit.errors import CheckpointError
from dernkit.models import writer
from dernkit.models.checkpoint import open_checkpoint
from dernkit.models.headers import INDEX, SINGLE
from dernkit.models.writer import ShardWriter

SHARDS = {
    "model-1.safetensors": {
        "a": torch.arange(12, dtype=torch.float32).view(3, 4),
        "half": torch.arange(6, dtype=torch.bfloat16),
        "double": torch.linspace(0, 1, 5, dtype=torch.float64),
    },
    "model-2.safetensors": {
        "b": torch.ones(2, 2),
        "count": torch.tensor([2**40, -1]),
        "mask": torch.tensor([True, False, True]),
        "scalar": torch.tensor(7, dtype=torch.int16),
        "nothing": torch.empty(0, 4),
    },
    "model-3.safetensors": {"ünïcode": torch.zeros(3)},
}
ALL = {name: tensor for tensors in SHARDS.values() for name, tensor in tensors.items()}
Make = Callable[..., ShardWriter]


@pytest.fixture(params=["one file", "shards"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint of many dtypes, in one file or in three with an index."""
    if request.param == "one file":
        save_file(ALL, tmp_path / SINGLE, metadata={"format": "pt", "who": "ünï"})
        return tmp_path
    return sharded(tmp_path)


def sharded(folder: Path) -> Path:
    for shard, tensors in SHARDS.items():
        save_file(tensors, folder / shard, metadata={"format": "pt"})
    weight_map = {name: shard for shard, tensors in SHARDS.items() for name in tensors}
    size = sum(tensor.nbytes for tensor in ALL.values())
    count = sum(tensor.numel() for tensor in ALL.values())
    index = {"metadata": {"total_size": size, "total_parameters": count, "note": "é"}, "weight_map": weight_map}
    (folder / INDEX).write_bytes(json.dumps(index, indent=4, ensure_ascii=False).replace("\n", "\r\n").encode())
    return folder


def open_writer(folder: Path, new: dict[str, Tensor], removed: frozenset[str] = frozenset()) -> ShardWriter:
    out = folder / "out"
    out.mkdir(exist_ok=True)
    blank = {name: torch.empty_like(tensor, device="meta") for name, tensor in new.items()}
    return ShardWriter(open_checkpoint(folder), out, blank, removed)


def write(folder: Path, new: dict[str, Tensor], removed: frozenset[str] = frozenset()) -> Path:
    """The whole of it; returns the output folder."""
    to_write = open_writer(folder, new, removed)
    to_write.allocate()
    to_write.put(new)
    to_write.copy_untouched()
    to_write.finish()
    return to_write.folder


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("replaced", [(), ("a", "mask"), tuple(ALL)])
def test_what_does_not_change_gives_the_same_files(folder: Path, replaced: tuple[str, ...]) -> None:
    assert files(write(folder, {name: ALL[name] for name in replaced})) == files(folder)


def test_a_header_in_another_style_stays_where_nothing_changes(tmp_path: Path) -> None:
    content = bytes(range(8))
    header = b'{ "x": {"shape": [2], "data_offsets": [0, 8], "dtype": "F32"}, "__metadata__": {"b": "1", "a": "2"} }'
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + content)
    assert files(write(tmp_path, {})) == files(tmp_path)


def test_replaced_tensors_change_and_all_others_keep_their_bits(folder: Path) -> None:
    new = {"a": torch.rand(2, 4), "b": torch.rand(1, 2, dtype=torch.float16), "scalar": torch.tensor(9)}
    found = loaded(write(folder, new))
    assert found.keys() == ALL.keys()
    for name, tensor in {**ALL, **new}.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert files(folder).keys() == files(folder / "out").keys()


def test_removed_tensors_are_nowhere(folder: Path) -> None:
    gone = frozenset({"half", "count"})
    assert loaded(write(folder, {}, gone)).keys() == ALL.keys() - gone


def test_a_shard_that_is_emptied_is_left_out_with_its_entries(tmp_path: Path) -> None:
    out = write(sharded(tmp_path), {}, frozenset(SHARDS["model-2.safetensors"]))
    index = json.loads((out / INDEX).read_text())
    assert not (out / "model-2.safetensors").exists()
    assert set(index["weight_map"].values()) == {"model-1.safetensors", "model-3.safetensors"}
    left = [ALL[name] for name in index["weight_map"]]
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in left),
        "total_parameters": sum(tensor.numel() for tensor in left),
        "note": "é",
    }
    assert open_checkpoint(out).tensors.keys() == index["weight_map"].keys()


def test_metadata_of_a_shard_that_changes_stays(folder: Path) -> None:
    out = write(folder, {"a": torch.rand(1, 4)})
    assert open_checkpoint(out).metadata == open_checkpoint(folder).metadata


def test_calls_that_move_few_bytes_at_a_time_give_the_same(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(writer, "_CHUNK", 13)
    monkeypatch.setattr(os, "pread", lambda descriptor, size, at: pread(descriptor, min(size, 5), at))
    monkeypatch.setattr(os, "pwrite", lambda descriptor, raw, at: pwrite(descriptor, raw[:3], at))
    assert files(write(folder, {"a": ALL["a"]})) == files(folder)


def test_a_source_that_shrinks_under_way_is_noticed(tmp_path: Path) -> None:
    to_write = open_writer(sharded(tmp_path), {})
    to_write.allocate()
    os.truncate(tmp_path / "model-3.safetensors", 90)
    with pytest.raises(CheckpointError, match=r"model-3\.safetensors: must stay the same while it is read"):
        to_write.copy_untouched()


@pytest.mark.parametrize("wrong", [torch.zeros(4, 3), torch.zeros(3, 4, dtype=torch.float16)])
def test_a_tensor_that_was_not_announced_so_is_refused(folder: Path, wrong: Tensor) -> None:
    to_write = open_writer(folder, {"a": ALL["a"]})
    to_write.allocate()
    with pytest.raises(CheckpointError, match=r"'a' must be F32 \[3, 4\]\. Got F(16|32) \[[34], [34]\] instead\."):
        to_write.put({"a": wrong})


def test_a_killed_call_is_gone_on_with(folder: Path) -> None:
    first = open_writer(folder, {"a": ALL["a"] + 1})
    assert not first.resumed
    first.allocate()
    first.put({"a": ALL["a"] + 1})
    second = open_writer(folder, {"a": ALL["a"] + 1})
    assert second.resumed
    second.allocate()
    second.copy_untouched()
    second.finish()
    assert torch.equal(loaded(second.folder)["a"], ALL["a"] + 1)


def test_files_of_another_layout_are_not_gone_on_with(folder: Path) -> None:
    open_writer(folder, {"a": ALL["a"]}).allocate()
    assert not open_writer(folder, {"a": ALL["a"][:2]}).resumed
    assert not open_writer(folder, {}, frozenset({"ünïcode", "half"})).resumed


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_noticed_while_files_are_allocated(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def full(descriptor: int, offset: int, size: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    to_write = open_writer(folder, {})
    with pytest.raises(CheckpointError, match=rf"room for [\d,]+ bytes\. Got '{os.strerror(number)}' instead\."):
        to_write.allocate()
    assert files(to_write.folder) == {}
