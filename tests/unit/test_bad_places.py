"""Where results may go: never into the model, over other files, twice at once, or half onto a full disk."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from safetensors import SafetensorError

from tests.unit.workbench import SHARDS, Workbench, hashes


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    return Workbench(tmp_path)


@pytest.mark.parametrize("inside", ["", "runs/one"])
def test_results_do_not_go_into_the_model(bench: Workbench, inside: str) -> None:
    bench.out = bench.model / inside
    assert bench.refusal(5) == (
        f"--out: must lie outside the model's directory. Got '{bench.out}', which is inside '{bench.model}', instead. "
        f"Choose another directory."
    )


def test_a_link_into_the_model_is_seen_through(bench: Workbench) -> None:
    bench.out.symlink_to(bench.model)
    assert bench.refusal(5).startswith("--out: must lie outside the model's directory.")


def test_a_run_does_not_replace_the_model_that_it_reads(bench: Workbench) -> None:
    bench.model = bench.finish()
    assert bench.refusal(5, "plan.keep=1.0") == (
        f"--out: must not hold the model that is read. Got '{bench.out}' for '{bench.model}' instead. "
        f"Choose another directory."
    )


def test_results_do_not_go_among_other_files(bench: Workbench) -> None:
    bench.out.mkdir()
    (bench.out / "thesis.tex").write_text("precious")
    assert bench.refusal(5) == (
        f"--out: must be empty, new, or an earlier run. Got '{bench.out}', which holds other files, instead. "
        f"Choose another directory."
    )
    assert hashes(bench.out).keys() == {"thesis.tex"}


def test_results_do_not_replace_a_file(bench: Workbench) -> None:
    bench.out.write_text("precious")
    assert bench.refusal(5) == f"--out: must be a directory. Got the file '{bench.out}' instead."
    assert bench.out.read_text() == "precious"


def test_an_empty_directory_will_do(bench: Workbench) -> None:
    bench.out.mkdir()
    assert (bench.finish() / "config.json").exists()


def test_one_directory_takes_one_run_at_a_time(bench: Workbench) -> None:
    bench.finish()
    before = hashes(bench.out)
    with (bench.out / ".lock").open() as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert bench.refusal(2, "plan.keep=6") == (
            f"--out: one run at a time may write '{bench.out}'. Got a second one instead. Wait for the first."
        )
    assert hashes(bench.out) == before


def test_a_full_disk_is_noticed_before_any_tensor_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second file does not fit: none stays, and the model of the run before does."""
    bench = Workbench(tmp_path, **SHARDS)
    shards = list(bench.finish().glob("*.safetensors"))
    allocate = os.posix_fallocate
    calls: list[int] = []

    def full(descriptor: int, offset: int, size: int) -> None:
        calls.append(size)
        if len(calls) > 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        allocate(descriptor, offset, size)

    monkeypatch.setattr(os, "posix_fallocate", full)
    folder = bench.out / ".partial/model"
    assert bench.refusal(5, "apply.router.use=additive") == (
        f"{folder}: the disk must have room for {sum(file.stat().st_size for file in shards):,} bytes. "
        f"Got 'No space left on device' instead. Free some space or choose another --out."
    )
    assert list(folder.glob("*.safetensors")) == []
    monkeypatch.undo()
    bench.finish("apply.router.use=additive")


FAILURES = {
    "writing statistics": ("dernkit.stages.calibrate.save_file", SafetensorError("I/O error: No space left on device")),
    "copying tensors": ("dernkit.models.writer.os.pwrite", OSError(errno.EIO, "No space left on device")),
    "renaming": ("dernkit.artifacts.os.replace", OSError(errno.EIO, "No space left on device")),
}


@pytest.mark.parametrize("what", FAILURES)
def test_what_fails_on_the_way_leaves_no_model_and_is_gone_on_with(
    bench: Workbench, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    place, error = FAILURES[what]

    def fail(*arguments: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(place, fail)
    result = bench.run()
    assert (result.exit_code, (bench.out / "model").exists()) == (5, False)
    assert result.stderr.splitlines()[-1].startswith(f"{bench.out}: must be readable and writable while a run lasts.")
    monkeypatch.undo()
    bench.finish()
