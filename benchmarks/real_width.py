"""Recombine one synthetic layer of a real model's size: time, memory, and how far that is from matrix products alone.

    python -m benchmarks.real_width [--hidden 4096 --width 14336 --tokens 16384 --keep 4 --device cpu] [--write-docs]

Random weights in bfloat16 and random inputs: they say nothing about quality, and take the time that real ones take. The
floor is the time of the matrix products alone, at the rate that the machine reaches on a large one in float32.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.tables import ROOT, markdown, write_page
from dernkit.builtin.function_space import FunctionSpace
from dernkit.builtin.merges import Adopt
from dernkit.builtin.refits import LeastSquares
from dernkit.builtin.routers import Slice
from dernkit.kernel import calls
from dernkit.kernel.compress import compress_layer
from dernkit.memory import peak_bytes
from dernkit.models.device import device_of
from dernkit.testing.banks import random_bank
from dernkit.types import Assignment, ExpertBank, LayerPlan, LayerStats, Retention

PAGE = ROOT / "docs" / "explanation" / "recombination.md"


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Until the device has done it."""
    start = time.perf_counter()
    work()
    torch.zeros(1, device=device).cpu()  # waits for what is before it
    return time.perf_counter() - start


def rate(device: torch.device, size: int = 4096) -> float:
    """Floating-point operations a second of a float32 matrix product, the best of three."""
    a, b = torch.randn(2, size, size).to(device)
    return 2 * size**3 / min(seconds(lambda: a @ b, device) for _ in range(3))


def machine(device: torch.device) -> str:
    """In words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} with {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB"
    return f"{torch.get_num_threads()} threads of {platform.machine()}"


def layer(hidden: int, width: int, tokens: int, device: torch.device) -> tuple[ExpertBank, LayerStats]:
    """Eight experts, top-2, and a sample."""
    bank = random_bank(8, width, hidden)
    assert bank.gate is not None
    half = {name: getattr(bank, name).to(device, torch.bfloat16) for name in ("gate", "up", "down")}
    bank = replace(bank, router=bank.router.to(device), **half)
    rng = torch.Generator().manual_seed(0)
    sample = (torch.randn(tokens, hidden, generator=rng) / hidden**0.5).to(torch.bfloat16)
    token = torch.arange(tokens)
    values = {"sample": sample, "sample_key": token, "sample_token": token}
    return bank, LayerStats(tokens, values, tokens).to(device)


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--width", type=int, default=14336)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--keep", type=int, default=4)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...; auto: a CUDA GPU where there is one")
    parser.add_argument("--write-docs", action="store_true", help="put the table into the page")
    arguments = parser.parse_args()
    device = device_of(arguments.device)
    speed = rate(device)
    bank, stats = layer(arguments.hidden, arguments.width, arguments.tokens, device)
    retention = Retention(torch.ones(8, dtype=torch.float64), torch.arange(arguments.keep))
    moves: list[Assignment] = []

    def choose() -> None:
        moves.append(calls.assign(FunctionSpace(parts=1), bank, retention, stats))

    def fit() -> None:
        plan = LayerPlan(0, 8, arguments.width, retention.scores, retention.kept, moves[0])
        compress_layer(bank, plan, Adopt(), Slice(), arguments.width, 0, stats, LeastSquares(ridge=0.1, passes=1))

    body = []
    for name, work in (("choose neurons", choose), ("fit projections", fit)):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            taken = seconds(work, device)
        floor = counter.get_total_flops() / speed
        body.append([name, f"{taken:.0f}", f"{floor:.0f}", f"{taken / floor:.1f}"])
    header = ["step", "seconds", "matrix products alone (s)", "ratio"]
    note = (
        f"\nH = {arguments.hidden:,}, W = {arguments.width:,}, 8 to {arguments.keep} experts, {arguments.tokens:,} "
        f"sampled tokens, nothing left out, one pass; {machine(device)} at {speed / 1e9:.0f} GFLOP/s in float32; "
        f"peak memory {peak_bytes() / 2**30:.1f} GiB."
    )
    table = markdown(header, body) + "\n" + note
    if arguments.write_docs:
        write_page(PAGE, {"real-width": table})
    else:
        print(table)


if __name__ == "__main__":
    main()
