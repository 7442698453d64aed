"""Headers, indices and what lies beside the tensors: what is read, what is copied, and that damage is never unsaid."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from dernkit.errors import CheckpointError
from dernkit.models.checkpoint import open_checkpoint
from dernkit.models.folder import SOURCE_CARD
from dernkit.models.headers import INDEX, SINGLE, read_header
from dernkit.models.source import open_source
from dernkit.models.universal import Universal
from tests.unit.workbench import SHARDS, Workbench, edit_config, put_value

quickly = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A folder with a checkpoint of three tensors."""
    tensors = {"b": torch.arange(6).view(2, 3), "a": torch.rand(4), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / SINGLE, metadata={"format": "pt", "note": "ünï"})
    return tmp_path


def test_entries_are_those_of_safetensors(small: Path) -> None:
    checkpoint = open_checkpoint(small)
    loaded = load_file(small / SINGLE)
    content = (small / SINGLE).read_bytes()
    assert checkpoint.tensors.keys() == loaded.keys()
    for name, tensor in loaded.items():
        entry = checkpoint.tensors[name]
        assert (entry.shape, entry.shard) == (tuple(tensor.shape), SINGLE)
        assert content[entry.start : entry.end] == tensor.numpy().tobytes()
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.metadata[SINGLE] == {"format": "pt", "note": "ünï"}
    assert checkpoint.tensor_bytes == sum(tensor.nbytes for tensor in loaded.values())


@quickly
@given(length=st.integers(0, 400))
def test_a_file_cut_anywhere_is_refused(small: Path, length: int) -> None:
    content = (small / SINGLE).read_bytes()
    (small / "cut.safetensors").write_bytes(content[: min(length, len(content) - 1)])
    with pytest.raises(CheckpointError, match=r"cut\.safetensors: must "):
        read_header(small / "cut.safetensors")


@quickly
@given(at=st.integers(0, 300), byte=st.integers(0, 255))
def test_a_scratched_header_is_refused_or_still_whole(small: Path, at: int, byte: int) -> None:
    content = bytearray((small / SINGLE).read_bytes())
    content[at % len(content)] = byte
    (small / "cut.safetensors").write_bytes(content)
    try:
        entries, _ = read_header(small / "cut.safetensors")
    except CheckpointError:
        return
    load_file(small / "cut.safetensors")
    assert len(entries) == 3


@pytest.mark.parametrize("header", [b"[]", b"5", b'{"a": 1}', b'{"a": {}}', b'{"a": {"dtype": "F32", "shape": [1]}}'])
def test_a_header_of_another_shape_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"must be a safetensors file\. Got a damaged header instead\."):
        open_checkpoint(tmp_path)


def test_another_format_beside_the_checkpoint_is_left_alone(small: Path) -> None:
    (small / "consolidated.safetensors").write_bytes((small / SINGLE).read_bytes())
    assert open_checkpoint(small).shards == (SINGLE,)


def test_an_index_of_one_file_is_followed(small: Path) -> None:
    (small / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(("a", "b", "empty"), SINGLE)}))
    assert open_checkpoint(small).indexed


@pytest.mark.parametrize("index", ["[]", '{"weight_map": []}', '{"weight_map": null}', "{}", "\xff"])
def test_an_index_of_another_shape_is_refused(small: Path, index: str) -> None:
    (small / INDEX).write_bytes(index.encode("latin-1"))
    with pytest.raises(CheckpointError, match="must be JSON with a 'weight_map' of tensor to shard"):
        open_checkpoint(small)


def test_the_fingerprint_sees_weights_and_config(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, **SHARDS)
    prints = [open_source(bench.model, [Universal()]).fingerprint()]
    shard = bench.model / "model-00003-of-00007.safetensors"
    put_value(shard, next(iter(load_file(shard))), 1.0)
    prints.append(open_source(bench.model, [Universal()]).fingerprint())
    edit_config(bench.model, rms_norm_eps=1e-4)
    prints.append(open_source(bench.model, [Universal()]).fingerprint())
    assert len(set(prints)) == 3


def test_what_is_beside_the_tensors_comes_along(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    extra = {"README.md": "card", "LICENSE": "terms", "chat_template.jinja": "{{ x }}", "tool.py": "pass"}
    left_out = {"pytorch_model.bin": "old", "model.gguf": "old", ".gitattributes": "x", "old.bin.index.json": "{}"}
    for name, text in {**extra, **left_out}.items():
        (bench.model / name).write_text(text)
    (bench.model / "original").mkdir()
    out = bench.finish()
    extra[SOURCE_CARD] = extra.pop("README.md")
    assert {name: (out / name).read_text() for name in extra} == extra
    assert not {file.name for file in out.iterdir()} & {*left_out, "original"}
    assert (out / "tokenizer.json").read_bytes() == (bench.model / "tokenizer.json").read_bytes()


def test_a_result_that_is_cut_again_carries_the_card_of_its_source(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    (bench.model / "README.md").write_text("card")
    bench.model, bench.out = bench.finish("plan.keep=6"), tmp_path / "again"
    out = bench.finish("plan.keep=4")
    assert (out / SOURCE_CARD).read_text() == (bench.model / "README.md").read_text()
    assert (out / f"SOURCE_{SOURCE_CARD}").read_text() == "card"
    assert "4 of 6 experts" in (out / "README.md").read_text()


def test_line_ends_of_the_config_stay(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    config = bench.model / "config.json"
    config.write_bytes(config.read_bytes().replace(b"\n", b"\r\n"))
    before, after = config.read_bytes().split(b"\r\n"), (bench.finish() / "config.json").read_bytes().split(b"\r\n")
    changed = [(a.strip(), b.strip()) for a, b in zip(before, after, strict=True) if a != b]
    assert changed == [(b'"num_local_experts": 8,', b'"num_local_experts": 4,')]
