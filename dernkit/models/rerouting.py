"""The model's own router on sampled inputs, with some experts out of its reach: no table of how families route.

A copy of the block runs without its experts. Its router's matrix product is seen on the way: there are the logits, and
there those of all but the wanted experts become −∞. That this is the pruned model's routing is a law of all families.
New router rows are put into the copy for as long as it runs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from dernkit.errors import CheckpointError
from dernkit.models.layout import Layout
from dernkit.models.stubs import stubbed
from dernkit.types import ExpertBank, LayerDims, Route, Routing


class Routable(Protocol):
    """What is read of a block."""

    path: str
    dims: LayerDims
    module: Any
    layout: Layout
    router_name: str
    per_expert_dims: dict[str, int]
    tables: tuple[str, ...]

    @property
    def router_bias(self) -> str | None: ...

    @property
    def experts_below(self) -> str: ...


class _RoutedError(Exception):
    """Ends a forward whose rest is not needed."""


class _Masked(TorchFunctionMode):
    """Matrix products with the router's weight: their results are kept, without the ``masked`` columns."""

    def __init__(self, shape: torch.Size, masked: Tensor) -> None:
        super().__init__()
        self._shapes = (tuple(shape), tuple(shape[::-1]))
        self._masked = masked
        self.logits: Tensor | None = None
        self.features: Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _PRODUCTS and len(args) > 1 and isinstance(args[1], Tensor) and tuple(args[1].shape) in self._shapes:
            out = out.clone()
            out[..., self._masked] = -torch.inf
            self.logits, self.features = out.flatten(0, -2), args[0].flatten(0, -2)
        return out


_PRODUCTS = (nn.functional.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__)


def router_submodule(block: Routable) -> str:
    """Path below the block of the module that holds the router's rows, one level down."""
    return block.router_name.rpartition(".")[0].split(".")[0]


def on_router_inputs(block: Routable, alone: bool, callback: Callable[[Tensor], None]) -> RemovableHandle:
    """Report what the block, or where it needs more than that its router, is called with."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        hidden = args[0] if args else next(iter(kwargs.values()))
        callback(hidden.reshape(-1, hidden.shape[-1]))

    module = block.module.get_submodule(router_submodule(block)) if alone else block.module
    return module.register_forward_pre_hook(hook, with_kwargs=True)


def route_of(block: Routable, alone: Callable[[], bool], scale: Callable[[], float], ones: Mapping[str, Any]) -> Route:
    """The route of :class:`dernkit.types.ExpertBank`; the copy is made when it is first asked for.

    Args:
        alone: whether the router runs without its block.
        scale: constant with which the block multiplies the experts' sum.
        ones: module path below the block -> attributes that are to be 1 (groups that become one).
    """
    copies: list[Any] = []

    def route(inputs: Tensor, experts: Tensor | None = None, rows: Tensor | None = None) -> Routing:
        if block.tables:
            raise CheckpointError(
                f"layer {block.dims.layer}: experts must be chosen by a router for tokens to be routed again. Got a "
                f"table of token ids instead. Use components that do not route again, such as scorer 'reap' and router "
                "'additive'."
            )
        if inputs.shape[-1] == 0:
            raise CheckpointError(
                f"layer {block.dims.layer}: tokens must be routed by their hidden states alone to be routed again. Got "
                f"a router that reads more instead. Use components that do not route again, such as scorer 'reap' and "
                "router 'additive'."
            )
        if not copies:
            copies.append(_copy(block, ones))
        with _with_rows(block, copies[0], experts, rows):
            return routed(block, copies[0], inputs, experts, alone(), scale())

    return route


def routes_again(bank: ExpertBank, inputs: Tensor, chosen: Tensor, coefficients: Tensor) -> bool:
    """Whether `ExpertBank.route` gives what the block did with these inputs; near-ties may fall otherwise.

    It does not where the router reads more than the hidden states (in ZAYA, the state of the router before it).
    """
    if bank.tables or bank.route is None:
        return False
    found = bank.route(inputs, None)
    size = max(bank.dims.experts, int(chosen.max()) + 1, int(found.chosen.max()) + 1)
    dense = torch.zeros(2, len(inputs), size, device=inputs.device)
    dense[0].scatter_add_(1, chosen, coefficients.to(torch.float32))
    dense[1].scatter_add_(1, found.chosen, found.coefficients)
    differ = (dense[0] - dense[1]).abs().amax(dim=1) > 0.05 * dense[0].amax(dim=1)
    return float(differ.to(torch.float32).mean()) < 0.05


def _copy(block: Routable, ones: Mapping[str, Any]) -> Any:
    with stubbed(block.module, block.experts_below, block.layout):
        module = copy.deepcopy(block.module).eval()
    for inner in module.modules():  # those that watch the block while it is calibrated would watch the copy too
        inner._forward_hooks.clear()
        inner._forward_pre_hooks.clear()
    for path, names in ones.items():
        for name in names:
            setattr(module.get_submodule(path), name, 1)
    return module


@contextmanager
def _with_rows(block: Routable, module: Any, experts: Tensor | None, rows: Tensor | None) -> Iterator[None]:
    """The module with other rows of the router, and other biases of its logits, for some experts (None: all)."""
    if rows is None:
        yield
        return
    weight = module.get_parameter(block.router_name).data
    places = _numbers(block, experts, weight.device)
    parts = [(weight, 0, rows[:, : weight.shape[1]])]
    if block.router_bias is not None:
        bias = dict((*module.named_parameters(), *module.named_buffers()))[block.router_bias].data
        parts.append((bias, block.per_expert_dims[block.router_bias], rows[:, -1]))
    before = [tensor.clone() for tensor, *_ in parts]
    try:
        for tensor, dim, values in parts:
            tensor.index_copy_(dim, places, values.to(tensor))
        yield
    finally:
        for (tensor, *_), values in zip(parts, before, strict=True):
            tensor.copy_(values)


def _numbers(block: Routable, experts: Tensor | None, device: torch.device) -> Tensor:
    return torch.arange(block.dims.experts, device=device) if experts is None else experts.to(device)


@torch.no_grad()
def routed(block: Routable, module: Any, inputs: Tensor, experts: Tensor | None, alone: bool, scale: float) -> Routing:
    count = block.dims.experts
    weight = module.get_parameter(block.router_name)
    masked = torch.ones(count, dtype=torch.bool, device=weight.device)
    masked[_numbers(block, experts, weight.device)] = False
    gone = masked.nonzero().flatten()
    hidden = inputs.to(weight)[None]
    kept = _mask_biases(block, module, gone)
    mode = _Masked(weight.shape, gone)
    try:
        with mode:
            chosen, coefficients = _run(block, module, hidden, alone)
    finally:
        for tensor, values in kept:
            tensor.copy_(values)
    if mode.logits is None:
        raise CheckpointError(
            f"{block.path}: the router's matrix product must be seen for tokens to be routed again. Got none instead. "
            f"Use components that do not route again."
        )
    coefficients = coefficients.to(torch.float32) * scale
    return Routing(
        chosen.reshape(len(inputs), -1),
        coefficients.reshape(len(inputs), -1),
        mode.logits[:, :count].float(),
        mode.features,
    )


def _mask_biases(block: Routable, module: Any, gone: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Correction biases of masked experts become −∞; returns what has to be put back."""
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    kept = []
    for name, dim in block.per_expert_dims.items():
        if name.endswith(("bias", "biases")):
            tensor = tensors[name].data
            kept.append((tensor, tensor.clone()))
            tensor.index_fill_(dim, gone, -torch.inf)
    return kept


def _run(block: Routable, module: Any, hidden: Tensor, alone: bool) -> tuple[Tensor, Tensor]:
    if alone:
        _, coefficients, chosen = module.get_submodule(router_submodule(block))(hidden[0])
        return chosen, coefficients
    seen: list[tuple[Tensor, Tensor]] = []

    def told(_: Tensor, chosen: Tensor, coefficients: Tensor) -> None:
        seen.append((chosen, coefficients))
        raise _RoutedError

    handle = block.layout.listen(module, module.get_submodule(block.experts_below), told)
    try:
        module(hidden)
    except _RoutedError:
        pass
    finally:
        handle.remove()
    return seen[0]
