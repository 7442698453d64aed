"""Checks by behaviour: what shapes and layout say of a block's routing is held against what the block does.

It runs on a random copy of the block without its experts, so no weight is needed.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dernkit.errors import CheckpointError
from dernkit.models.rerouting import Routable, router_submodule
from dernkit.models.router_kind import router_kind
from dernkit.models.stubs import stubbed
from dernkit.sentences import reason
from dernkit.types import LayerDims

_TOKENS = 48
NOT_RUN = (TypeError, ValueError, RuntimeError, AttributeError, LookupError)
"""What code raises that does not fit to what it is called with."""


class _Block(Routable, Protocol):
    @property
    def hidden(self) -> int: ...

    @property
    def experts(self) -> Any: ...


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What was seen of one block."""

    router: str
    """What the router does, in words."""
    scale: float
    """Constant with which the block multiplies the experts' sum after them; 1 where something else follows."""
    alone: bool
    """Whether the block needs more than hidden states, so that its router was run without it."""


@dataclass(frozen=True, slots=True)
class _Routing:
    inputs: Tensor
    chosen: Tensor
    coefficients: Tensor
    outputs: list[Tensor]
    """What the router returned."""
    alone: bool
    """Whether the router ran without its block."""


def rehearse(block: _Block) -> Rehearsal:
    """Run the block on random tokens, move the entries of its experts around, and run it again.

    Raises:
        CheckpointError: the choice does not move with the entries: something else follows the experts, or the rows
            before the last are not theirs.
    """
    module = random_copy(block)
    with torch.no_grad():
        first = _routing(block, module)
        scale = _scale(block, module) if block.layout.router is None else _told_scale(block, module, first)
        kind = router_kind(_logits(block, module, first), first.coefficients, first.chosen) + _bias(block)
        order = _order(block.dims)
        _permute(block, module, order)
        second = _routing(block, module)
    if first.chosen.shape[1] != block.dims.top_k or not _same(first, second, order, block.dims.experts):
        raise CheckpointError(
            f"{block.path}: the router must choose the experts whose entries it holds. Got another choice after they "
            f"were moved, in '{block.router_name}' and {len(block.per_expert_dims)} more, instead. "
            f"This family needs an adapter plugin."
        )
    return Rehearsal(kind, scale, first.alone)


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


def random_copy(block: _Block) -> Any:
    """The block with random weights and buffers, its experts replaced."""
    with stubbed(block.module, block.experts_below, block.layout):
        module = copy.deepcopy(block.module)
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
    return module


def _hidden(block: _Block) -> Tensor:
    return torch.randn(1, _TOKENS, block.hidden, generator=torch.Generator().manual_seed(1))


def _routing(block: _Block, module: Any) -> _Routing:
    """The routing of random tokens by the block; by the router alone where the block needs more than tokens."""
    seen: list[tuple[Tensor, Tensor, Tensor]] = []
    outputs: list[Tensor] = []
    alone = False

    def returned(_: nn.Module, args: Any, output: Any) -> None:
        outputs.extend(output if isinstance(output, tuple) else [output])

    router = module.get_submodule(router_submodule(block))
    handles = [
        block.layout.listen(module, module.get_submodule(block.experts_below), lambda *told: seen.append(told)),
        router.register_forward_hook(returned),
    ]
    try:
        _forward(block, module)
    except NOT_RUN as error:
        if block.layout.router is not None:  # what its layout tells can be checked in the block only
            raise _not_run(block, error) from None
        seen.append(_router_alone(block, router))
        alone = True
    finally:
        for handle in handles:
            handle.remove()
    if not seen:
        raise CheckpointError(
            f"{block.path}: a forward of the block must show its routing. Got none where {type(block.layout).__name__} "
            f"listens instead. This family needs an adapter plugin."
        )
    return _Routing(*seen[0], outputs, alone)


def _forward(block: _Block, module: Any) -> Tensor:
    tokens = [torch.arange(_TOKENS)[None]] if block.tables else []
    output = module(_hidden(block), *tokens)
    return output[0] if isinstance(output, tuple) else output


def _router_alone(block: _Block, router: Any) -> tuple[Tensor, Tensor, Tensor]:
    hidden = _hidden(block)[0]
    try:
        _, coefficients, chosen = router(hidden)
    except NOT_RUN as error:
        raise _not_run(block, error) from None
    return hidden, chosen, coefficients


def _not_run(block: _Block, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{block.path}: the block, or its router, must run on hidden states alone to be understood. "
        f"Got '{reason(error)}' instead. This family needs an adapter plugin."
    )


def _scale(block: _Block, module: Any) -> float:
    if block.layout.coefficient_on_input:
        return 1.0
    stub = module.get_submodule(block.experts_below)
    try:
        before = _forward(block, module)
        stub.value = 1.0
        change = _forward(block, module) - before
    except NOT_RUN:
        return 1.0
    mean = float(change.mean())
    return mean if float((change - mean).abs().max()) < 1e-3 * abs(mean) and abs(mean - 1) > 1e-4 else 1.0


def _told_scale(block: _Block, module: Any, told: _Routing) -> float:
    """The same where the layout tells the routing: experts that multiply must add what it says, but for a constant.

    Raises:
        CheckpointError: they add something else: the block makes another routing of the router's output.
    """
    before = _forward(block, module)
    rng = torch.Generator().manual_seed(2)
    factors = torch.randn(block.dims.experts, told.inputs.shape[-1], generator=rng)
    for stub, factor in zip(
        block.layout.members(module.get_submodule(block.experts_below)).values(), factors, strict=True
    ):
        stub.factors = factor
    found = (_forward(block, module) - before).flatten(0, -2)
    beyond = max(0, int(told.chosen.max()) + 1 - len(factors))  # identity experts: no stubs
    factors = torch.cat([factors, factors.new_zeros(beyond, factors.shape[1])])
    expected = (told.coefficients[:, :, None] * factors[told.chosen]).sum(dim=1) * told.inputs
    if found.shape == expected.shape:
        scale = float((found * expected).sum() / expected.square().sum().clamp(min=1e-30))
        if scale > 0 and torch.allclose(found, scale * expected, rtol=1e-3, atol=1e-3 * float(found.abs().max())):
            return scale if abs(scale - 1) > 1e-4 else 1.0
    raise CheckpointError(
        f"{block.path}: the block must add coefficient times expert output for the routing that its layout tells. "
        f"Got another sum instead. Correct `route` in {type(block.layout).__name__}."
    )


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
