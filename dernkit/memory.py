"""Peak resident memory of a piece of work."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

_CLEAR, _STATUS = Path("/proc/self/clear_refs"), Path("/proc/self/status")


@dataclass(slots=True)
class Cost:
    """What a stage took; filled in when its ``with`` block ends."""

    seconds: float = 0.0
    peak_bytes: int = 0


@contextmanager
def measured() -> Iterator[Cost]:
    """Wall time and peak resident memory of the block (of the process so far where the kernel cannot reset it)."""
    cost, start = Cost(), time.monotonic()
    _reset_peak()
    yield cost
    cost.seconds = time.monotonic() - start
    cost.peak_bytes = peak_bytes()


def _reset_peak() -> None:
    with suppress(OSError):  # not Linux, or not allowed: the peak is then that of the whole process
        _CLEAR.write_text("5")


def peak_bytes() -> int:
    """Peak resident set since the last reset."""
    try:
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
