"""Time of one-to-one matching: scipy against the Jonker-Volgenant solver of lapx, at the same optimum.

    pip install lapx
    python benchmarks/hungarian.py [--sizes 512 1024 2048 4096 8192] [--features 1024]

Matches the neurons of two synthetic experts by the cosine of their weights, as similarity `hungarian` does: half of the
second one's neurons are noisy copies of the first one's (`upcycled`), or none are (`apart`). Prints the CPU seconds of
both solvers (what else the machine does counts less than by the clock), their ratio (above 1: scipy is faster), and
the seconds by the clock of two matrices in one thread and in two, as scipy lets go of the interpreter.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from time import perf_counter, process_time

import torch
from torch import Tensor

from dernkit.kernel.matching import cosines
from dernkit.kernel.one_to_one import one_to_one, one_to_one_each

KINDS = {"upcycled": 0.5, "apart": 0.0}


def affinities(size: int, features: int, copied: float, seed: int) -> Tensor:
    """Cosines between the neurons of two experts, the ``copied`` share of which are twins with as much noise again."""
    rng = torch.Generator().manual_seed(seed)
    one, other = torch.randn(2, size, features, generator=rng)
    twins = int(copied * size)
    other[:twins] += one[:twins]
    return cosines(one, other[torch.randperm(size, generator=rng)])


def total(affinity: Tensor, partner: Tensor) -> float:
    """Sum of the matched affinities."""
    return float(affinity.double().gather(1, partner[:, None]).sum())


def timed(work: Callable[[], Tensor], clock: Callable[[], float] = process_time) -> tuple[float, Tensor]:
    """Seconds and result."""
    start = clock()
    result = work()
    return clock() - start, result


def by_lapx(affinity: Tensor) -> Tensor:
    """The same matching by lapx."""
    import lap

    _, columns, _ = lap.lapjv(affinity.to(torch.float64).neg().numpy())
    return torch.from_numpy(columns).to(torch.int64)


def main() -> None:
    """Time both solvers on every size and kind, then threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048, 4096, 8192], help="neurons")
    parser.add_argument("--features", type=int, default=1024, help="length of a neuron's vector")
    arguments = parser.parse_args()
    print(f"{'neurons':>8} {'kind':>9} {'scipy':>9} {'lapx':>9} {'ratio':>7} {'difference':>11}")
    for size in arguments.sizes:
        for kind, copied in KINDS.items():
            affinity = affinities(size, arguments.features, copied, seed=size)
            scipy_seconds, ours = timed(lambda affinity=affinity: one_to_one(affinity))
            lapx_seconds, theirs = timed(lambda affinity=affinity: by_lapx(affinity))
            difference = total(affinity, ours) - total(affinity, theirs)
            ratio = lapx_seconds / scipy_seconds
            print(f"{size:8} {kind:>9} {scipy_seconds:8.2f}s {lapx_seconds:8.2f}s {ratio:7.2f} {difference:11.1e}")
    pair = [affinities(2048, arguments.features, 0.5, seed) for seed in (1, 2)]
    solve = [lambda workers=workers: one_to_one_each(pair, workers)[0][1] for workers in (1, 2)]
    seconds = [min(timed(work, perf_counter)[0] for _ in range(3)) for work in solve]
    print(f"two matrices of 2048: {seconds[0]:.2f} s in one thread, {seconds[1]:.2f} s in two")


if __name__ == "__main__":
    main()
