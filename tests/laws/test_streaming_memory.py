"""Memory stays that of one decoder layer, whatever the size of the checkpoint."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("options", [[], ["--fp8"]], ids=["fp32", "fp8"])
def test_two_gigabytes_in_sixteen_layers_take_less_than_1200_megabytes(options: list[str]):
    command = [sys.executable, str(BENCHMARK), "--gigabytes", "2", "--layers", "16", "--limit-gigabytes", "1.2"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
