"""Checks by behaviour: what shapes say of a block is held against what the block does.

The router's part runs on a random copy of the block without its experts, so no weight is needed; the experts' part runs
on the block's own weights, a few tokens of them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dernkit.errors import CheckpointError
from dernkit.models.layouts import Layout
from dernkit.models.router_kind import router_kind
from dernkit.sentences import reason
from dernkit.types import ExpertBank, LayerDims

_TOKENS = 48
_NOT_RUN = (TypeError, ValueError, RuntimeError, AttributeError, IndexError)
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}


class _Block(Protocol):
    path: str
    dims: LayerDims
    module: Any
    experts_path: str
    layout: Layout
    router_name: str
    per_expert_dims: dict[str, int]
    tables: tuple[str, ...]

    @property
    def hidden(self) -> int: ...

    def bank(self) -> ExpertBank: ...


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What was seen of one block."""

    router: str
    """What the router does, in words."""
    scale: float
    """Constant with which the block multiplies the experts' sum after them; 1 where something else follows."""


@dataclass(frozen=True, slots=True)
class _Routing:
    chosen: Tensor
    coefficients: Tensor
    outputs: list[Tensor]
    """What the router returned."""


class _Stub(nn.Module):
    """In the experts' place: adds ``value`` and nothing else."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.value = 0.0
        self.num_experts = getattr(experts, "num_experts", 0)

    def forward(self, hidden: Tensor, *rest: Tensor) -> Tensor:
        return torch.full_like(hidden, self.value)


def rehearse(block: _Block) -> Rehearsal:
    """Run the block on random tokens, move the entries of its experts around, and run it again.

    Raises:
        CheckpointError: the choice does not move with the entries: something else follows the experts, or the rows
            before the last are not theirs.
    """
    module, stub = _copy(block)
    with torch.no_grad():
        first = _routing(block, module, stub)
        scale = _scale(block, module, stub)
        kind = router_kind(_logits(block, module, first), first.coefficients, first.chosen) + _bias(block)
        order = _order(block.dims)
        _permute(block, module, order)
        second = _routing(block, module, stub)
    if first.chosen.shape[1] != block.dims.top_k or not _same(first, second, order, block.dims.experts):
        raise CheckpointError(
            f"{block.path}: the router must choose the experts whose entries it holds. Got another choice after they "
            f"were moved, in '{block.router_name}' and {len(block.per_expert_dims)} more, instead. "
            f"This family needs an adapter plugin."
        )
    return Rehearsal(kind, scale)


def _bias(block: _Block) -> str:
    """A correction bias takes part in the choice alone; a plain one is in the logits."""
    if block.tables:
        return ", chosen by a table of token ids"
    if any("correction" in name or "expert_bias" in name or "balancing" in name for name in block.per_expert_dims):
        return " + correction bias"
    return " + bias" if any(name.endswith("bias") for name in block.per_expert_dims) else ""


def _logits(block: _Block, module: Any, routing: _Routing) -> list[Tensor]:
    rows = module.get_parameter(block.router_name)
    found = [out for out in routing.outputs if out.ndim == 2 and out.shape[1] >= block.dims.experts]
    return [*found, _hidden(block)[0] @ rows.T] if rows.shape[1] == block.hidden else found


def _copy(block: _Block) -> tuple[Any, _Stub]:
    """The block with random weights and buffers, its experts replaced."""
    name = block.experts_path.removeprefix(block.path + ".")
    parent, _, leaf = name.rpartition(".")
    owner = block.module.get_submodule(parent)
    experts = getattr(owner, leaf)
    stub = _Stub(experts)
    setattr(owner, leaf, stub)
    try:
        module = copy.deepcopy(block.module)
    finally:
        setattr(owner, leaf, experts)
    module = module.to_empty(device="cpu").eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                spread = max(tensor.shape[-1:], default=1) ** -0.5
                tensor.data = torch.empty(tensor.shape).normal_(generator=rng).mul_(spread)
        for table in block.tables:
            buffer = module.get_buffer(table)
            noise = torch.rand(len(buffer), block.dims.experts, generator=rng)
            buffer.copy_(noise.argsort(dim=1)[:, : buffer.shape[1]])
    return module, module.get_submodule(name)


def _hidden(block: _Block) -> Tensor:
    return torch.randn(1, _TOKENS, block.hidden, generator=torch.Generator().manual_seed(1))


def _routing(block: _Block, module: Any, stub: _Stub) -> _Routing:
    """The routing of random tokens by the block; by the router alone where the block needs more than tokens."""
    seen: list[tuple[Tensor, Tensor]] = []
    outputs: list[Tensor] = []

    def returned(_: nn.Module, args: Any, output: Any) -> None:
        outputs.extend(output if isinstance(output, tuple) else [output])

    router = module.get_submodule(block.router_name.rpartition(".")[0].split(".")[0])
    handles = [
        block.layout.listen(module, stub, lambda _, chosen, coefficients: seen.append((chosen, coefficients))),
        router.register_forward_hook(returned),
    ]
    try:
        _forward(block, module)
    except _NOT_RUN:
        seen.append(_router_alone(block, router))
    finally:
        for handle in handles:
            handle.remove()
    return _Routing(*seen[0], outputs)


def _forward(block: _Block, module: Any) -> Tensor:
    tokens = [torch.arange(_TOKENS)[None]] if block.tables else []
    output = module(_hidden(block), *tokens)
    return output[0] if isinstance(output, tuple) else output


def _router_alone(block: _Block, router: Any) -> tuple[Tensor, Tensor]:
    try:
        _, coefficients, chosen = router(_hidden(block)[0])
    except _NOT_RUN as error:
        raise CheckpointError(
            f"{block.path}: the block, or its router, must run on hidden states alone to be understood. "
            f"Got '{reason(error)}' instead. This family needs an adapter plugin."
        ) from None
    return chosen, coefficients


def _scale(block: _Block, module: Any, stub: _Stub) -> float:
    if block.layout.coefficient_on_input:
        return 1.0
    try:
        before = _forward(block, module)
        stub.value = 1.0
        change = _forward(block, module) - before
    except _NOT_RUN:
        return 1.0
    mean = float(change.mean())
    return mean if float((change - mean).abs().max()) < 1e-3 * abs(mean) and abs(mean - 1) > 1e-4 else 1.0


def _order(dims: LayerDims) -> Tensor:
    """Every expert one place on within its group."""
    size = dims.experts // dims.groups
    places = torch.arange(dims.experts)
    return places // size * size + (places + 1) % size


def _permute(block: _Block, module: Any, order: Tensor) -> None:
    for name, dim in {block.router_name: 0, **block.per_expert_dims}.items():
        owner, _, leaf = name.rpartition(".")
        data = getattr(module.get_submodule(owner), leaf).data
        extra = torch.arange(len(order), data.shape[dim])
        data.copy_(data.index_select(dim, torch.cat([order, extra])))
    for name in block.tables:
        table = module.get_buffer(name)
        table.copy_(torch.argsort(order)[table])


def _same(first: _Routing, second: _Routing, order: Tensor, experts: int) -> bool:
    """Whether both chose the same experts with the same coefficients, ``second`` in the new order."""
    beyond = max(experts, int(first.chosen.max()) + 1, int(second.chosen.max()) + 1)
    moved = torch.cat([order, torch.arange(experts, beyond)])
    dense = []
    for routing, names in ((first, torch.arange(beyond)), (second, moved)):
        empty = torch.zeros(len(routing.chosen), beyond, dtype=torch.float64)
        dense.append(empty.scatter_add_(1, names[routing.chosen], routing.coefficients.to(torch.float64)))
    return torch.allclose(dense[0], dense[1], rtol=1e-3, atol=1e-5)


def check_experts(block: _Block) -> None:
    """Hold the bank's experts against the module's own forward on a few random tokens, with the weights as they are.

    Raises:
        CheckpointError: they compute something else.
    """
    bank, experts = block.bank(), block.module.get_submodule(block.experts_path.removeprefix(block.path + "."))
    rng = torch.Generator().manual_seed(0)
    top_k, dtype = block.dims.top_k, bank.up.dtype
    pool = torch.randperm(block.dims.experts, generator=rng)[: max(top_k, 3)]
    chosen = torch.stack([pool[torch.randperm(len(pool), generator=rng)[:top_k]] for _ in range(4)])
    hidden = torch.randn(4, block.dims.hidden, generator=rng).to(dtype)
    coefficients = (0.5 + torch.rand(4, top_k, generator=rng)).to(dtype)
    with torch.no_grad(), _of_one_dtype(experts, dtype):
        found = block.layout.run(experts, hidden, chosen, coefficients).to(torch.float32)
    with torch.no_grad():
        expected = torch.stack([_summed(bank, *token) for token in zip(hidden, chosen, coefficients, strict=True)])
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    if not error < _TOLERANCE.get(dtype, 5e-2):
        raise CheckpointError(
            f"{block.experts_path}: experts must compute down(act(gate(x)) * up(x)) of the weights found. Got outputs "
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
    total = torch.zeros(bank.dims.hidden)
    for expert, coefficient in zip(chosen.tolist(), coefficients.to(torch.float32), strict=True):
        if bank.coefficient_on_input:
            total += bank.output(expert, (coefficient * hidden)[None])[0]
        else:
            total += coefficient * bank.output(expert, hidden[None])[0]
    return total
