"""Files of a checkpoint that are missing or damaged: one sentence, exit code 5, nothing made and nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.unit.workbench import INDEX, SHARDS, Workbench, edit_json, edit_tensors

THIRD = "model-00003-of-00007.safetensors"
Break = Callable[[Path], object]


def shorten(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def scratch(file: Path, at: int, byte: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] = byte
    file.write_bytes(content)


def repeat_tensor(folder: Path) -> None:
    """The first tensor of the third shard is put into the fourth, too."""
    found: dict[str, Tensor] = {}
    edit_tensors(folder / THIRD, found.update)
    name = min(found)
    edit_tensors(folder / THIRD.replace("3", "4", 1), lambda tensors: tensors.update({name: found[name]}))


def move_shard(folder: Path) -> None:
    """A shard outside the folder, with an index that leads there."""
    (folder / THIRD).rename(folder.parent / THIRD)

    def lead_out(index: Any) -> None:
        moved = [name for name, shard in index["weight_map"].items() if shard == THIRD]
        index["weight_map"].update(dict.fromkeys(moved, f"../{THIRD}"))

    edit_json(folder / INDEX, lead_out)


FILES: dict[str, tuple[Break, str]] = {
    "weights only as a pickle": (
        lambda path: (path / "model.safetensors").rename(path / "pytorch_model.bin"),
        "{path}: must hold model.safetensors or shards with model.safetensors.index.json. Got only pytorch_model.bin "
        "instead. Convert it with transformers' `save_pretrained`.",
    ),
    "no weights": (
        lambda path: (path / "model.safetensors").unlink(),
        "{path}: must hold model.safetensors or shards with model.safetensors.index.json. Got none instead. "
        "Convert it with transformers' `save_pretrained`.",
    ),
    "shards without an index": (
        lambda path: (path / "model.safetensors").rename(path / "model-1.safetensors"),
        "{path}: a checkpoint of several shards must have model.safetensors.index.json. Got 1 *.safetensors files "
        "without it instead. Download it.",
    ),
    "no config": (
        lambda path: (path / "config.json").unlink(),
        "{path}: must hold config.json. Got none instead. Give the directory of a checkpoint.",
    ),
    "config that is not JSON": (
        lambda path: (path / "config.json").write_text('{"model_type": "mixtral",'),
        "{path}/config.json: must be JSON. Got 'Expecting property name enclosed in double quotes: line 1 column 26 "
        "(char 25)' instead. Download it again.",
    ),
    "config that is a list": (
        lambda path: (path / "config.json").write_text("[]"),
        "{path}/config.json: must be a JSON object. Got a list instead. Download it again.",
    ),
    "truncated file": (
        lambda path: shorten(path / "model.safetensors"),
        "{path}/model.safetensors: must have {size} bytes by its own header. Got {less} instead. Download it again.",
    ),
    "empty file": (
        lambda path: (path / "model.safetensors").write_bytes(b""),
        "{path}/model.safetensors: must have 8 bytes by its own header. Got 0 instead. Download it again.",
    ),
    "header that is not JSON": (
        lambda path: scratch(path / "model.safetensors", 10, 0xFF),
        "{path}/model.safetensors: must be a safetensors file. Got a damaged header instead. Download it again.",
    ),
    "header whose ranges overlap": (
        lambda path: (path / "model.safetensors").write_bytes(
            (path / "model.safetensors").read_bytes().replace(b'"data_offsets":[0,', b'"data_offsets":[4,', 1)
        ),
        "{path}/model.safetensors: must be a safetensors file. Got a damaged header instead. Download it again.",
    ),
}

SHARDED: dict[str, tuple[Break, str]] = {
    "missing shard": (
        lambda path: (path / THIRD).unlink(),
        "{path}/" + THIRD + ": must exist, the index names it. Got no such file instead. Download the shard.",
    ),
    "shard that is a directory": (
        lambda path: ((path / THIRD).unlink(), (path / THIRD).mkdir()),
        "{path}/" + THIRD + ": must be a file that can be read. Got 'Is a directory' instead.",
    ),
    "truncated shard": (
        lambda path: shorten(path / THIRD),
        "{path}/" + THIRD + ": must have {size} bytes by its own header. Got {less} instead. Download it again.",
    ),
    "tensor in two shards": (
        repeat_tensor,
        "{path}: every tensor must lie in one shard. Got 'model.layers.0.block_sparse_moe.experts.0.w1.weight' in both "
        + f"{THIRD} and {THIRD.replace('3', '4', 1)} instead. Remove one of them.",
    ),
    "index that names a tensor too many": (
        lambda path: edit_json(path / INDEX, lambda index: index["weight_map"].update(ghost=THIRD)),
        "{path}/" + f"{INDEX}: every tensor it names must lie in the shard it names. Got 'ghost', which {THIRD} does "
        "not hold, instead. Download the index and that shard again.",
    ),
    "index that lacks a tensor": (
        lambda path: edit_json(path / INDEX, lambda index: index["weight_map"].pop("lm_head.weight")),
        "{path}/" + f"{INDEX}: must name every tensor of the shards. Got no entry for 'lm_head.weight' of "
        "model-00001-of-00007.safetensors instead. Download the index again.",
    ),
    "index that is not JSON": (
        lambda path: (path / INDEX).write_text("{"),
        "{path}/" + f"{INDEX}: must be JSON with a 'weight_map' of tensor to shard. Got 'Expecting property name "
        "enclosed in double quotes: line 1 column 2 (char 1)' instead. Download it again.",
    ),
    "index that leads out of the directory": (
        move_shard,
        "{path}/" + f"{INDEX}: shards must be *.safetensors files beside it. Got '../{THIRD}' instead. "
        "Download the index again.",
    ),
    "a second checkpoint beside the index": (
        lambda path: (path / "model.safetensors").write_bytes((path / THIRD).read_bytes()),
        "{path}: must hold one checkpoint. Got model.safetensors and an index of other shards instead. "
        "Remove one of them.",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_damaged_files_are_refused_and_named(tmp_path: Path, case: str) -> None:
    bench = Workbench(tmp_path)
    size = (bench.model / "model.safetensors").stat().st_size
    FILES[case][0](bench.model)
    assert bench.refusal(5) == FILES[case][1].format(path=bench.model, size=size, less=size - 1)


@pytest.mark.parametrize("case", SHARDED)
def test_shards_and_index_that_disagree_are_refused(tmp_path: Path, case: str) -> None:
    bench = Workbench(tmp_path, **SHARDS)
    size = (bench.model / THIRD).stat().st_size
    SHARDED[case][0](bench.model)
    assert bench.refusal(5) == SHARDED[case][1].format(path=bench.model, size=size, less=size - 1)
