"""A check by behaviour: canonical weights are held against the experts' own forward, on a few tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dernkit.errors import CheckpointError
from dernkit.models.layout import Layout
from dernkit.models.rehearsal import NOT_RUN
from dernkit.sentences import reason
from dernkit.types import ExpertBank, LayerDims

_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


class _Block(Protocol):
    path: str
    dims: LayerDims
    layout: Layout

    @property
    def experts(self) -> Any: ...

    @property
    def experts_below(self) -> str: ...

    def bank(self) -> ExpertBank: ...


def check_experts(block: _Block) -> None:
    """Hold the bank's experts against the module's own forward on a few random tokens, with the weights as they are.

    Raises:
        CheckpointError: they compute something else.
    """
    bank, experts, where = block.bank(), block.experts, f"{block.path}.{block.experts_below}".rstrip(".")
    rng = torch.Generator().manual_seed(0)
    top_k, dtype, device = block.dims.top_k, bank.up.dtype, bank.up.device
    pool = torch.randperm(block.dims.experts, generator=rng)[: max(top_k, 3)]
    chosen = torch.stack([pool[torch.randperm(len(pool), generator=rng)[:top_k]] for _ in range(4)]).to(device)
    hidden = torch.randn(4, block.dims.hidden, generator=rng).to(device, dtype)
    coefficients = (0.5 + torch.rand(4, top_k, generator=rng)).to(device, dtype)
    try:
        with torch.no_grad(), _of_one_dtype(experts, dtype):
            found = block.layout.run(experts, hidden, chosen, coefficients).to(torch.float32)
    except NOT_RUN as problem:
        raise CheckpointError(
            f"{where}: experts must run on a few tokens as their layout says. Got '{reason(problem)}' instead. "
            f"This family needs an adapter plugin."
        ) from None
    with torch.no_grad():
        expected = torch.stack([_summed(bank, *token) for token in zip(hidden, chosen, coefficients, strict=True)])
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error < _TOLERANCE.get(dtype, 5e-2):
        raise CheckpointError(
            f"{where}: experts must compute down(act(gate(x)) * up(x)) of the weights found. Got outputs "
            f"that differ by {error:.1%} instead. This family needs an adapter plugin."
        )


@contextmanager
def _of_one_dtype(experts: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Parameters as they lie on disk may be of several dtypes (biases), in which the module would not run."""
    others = {parameter: parameter.data for parameter in experts.parameters() if parameter.dtype != dtype}
    for parameter, data in others.items():
        parameter.data = data.to(dtype)
    try:
        yield
    finally:
        for parameter, data in others.items():
            parameter.data = data


def _summed(bank: ExpertBank, hidden: Tensor, chosen: Tensor, coefficients: Tensor) -> Tensor:
    total = torch.zeros(bank.dims.hidden, device=hidden.device)
    for expert, coefficient in zip(chosen.tolist(), coefficients.to(torch.float32), strict=True):
        if bank.coefficient_on_input:
            total += bank.output(expert, (coefficient * hidden)[None])[0]
        else:
            total += coefficient * bank.output(expert, hidden[None])[0]
    return total
