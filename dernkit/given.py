"""Statistics that another run has collected: whether they are the model's, and all that a recipe's components read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from dernkit.artifacts import safetensors_key
from dernkit.errors import CheckpointError
from dernkit.kernel.statistics import Reader, refuse_lacking
from dernkit.stages.calibrate import load_stats

SEQUENTIAL = "sequential"


def stats_key(fingerprint: str, digest: str, *, sequential: bool) -> str:
    """What `stats.safetensors` carries: the model, whether its layers saw compressed ones, and all inputs' digest."""
    return ".".join([fingerprint, *([SEQUENTIAL] if sequential else []), digest])


def check_given(file: Path, fingerprint: str, readers: Sequence[Reader], command: str) -> None:
    """Refuse statistics that a recipe cannot be planned from.

    Args:
        file: a `stats.safetensors`.
        fingerprint: the model's.
        readers: all components that read statistics.
        command: what to type to have those that are lacking collected.

    Raises:
        CheckpointError: the file is no such file, of another model or of a sequential calibration, or lacks something.
    """
    where = "--statistics"
    if not file.is_file():
        raise CheckpointError(f"{where}: must be the stats.safetensors of a run. Got '{file}', where none is, instead.")
    key = safetensors_key(file)
    try:
        stats = load_stats(file) if key else {}
    except (SafetensorError, KeyError, ValueError):
        stats = {}
    if key is None or not stats:
        raise CheckpointError(f"{where}: must be the stats.safetensors of a run. Got '{file}', another file, instead.")
    model, *kind = key.split(".")
    if model != fingerprint:
        raise CheckpointError(
            f"{where}: must be made from the model that is compressed. Got '{file}', made from another one, instead. "
            f"Leave out {where} to calibrate."
        )
    if SEQUENTIAL in kind:
        raise CheckpointError(
            f"{where}: must be made from the model as it is. Got '{file}', made while it was compressed as another "
            f"plan says, instead. Take those of a run without calibrate.sequential."
        )
    refuse_lacking(stats, readers, f"'{file}'", f"Add it with: {command}")
