"""Experts that are never chosen, so that all layers have one count: only where the router allows that exactly.

A padding expert has weights and router rows of zeros, and a bias so low that it loses against every other expert.
Which bias does that, if any, is found by running the router, never by its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dernkit.api import Block
from dernkit.errors import CheckpointError
from dernkit.models.rehearsal import NOT_RUN, random_copy
from dernkit.models.rerouting import Routable, routed
from dernkit.types import CompressedLayer, ExpertBank, LayerDims, Routing

if TYPE_CHECKING:
    from dernkit.models.store import Store

_TOKENS = 256
_LOUDNESS = (1.0, 30.0)
"""Random tokens are looked at as they are, and far larger."""


class _Block(Routable, Protocol):
    @property
    def hidden(self) -> int: ...

    @property
    def experts(self) -> Any: ...


def lowest(dtype: torch.dtype) -> float:
    """A bias with which no expert is chosen: finite also where it is added to a score, and in half precision."""
    return torch.finfo(dtype).min if dtype == torch.float16 else -1e30


def padding_bias(block: _Block, *, alone: bool, scale: float) -> str | None:
    """The tensor with an entry for each expert that, when low, keeps experts from ever being chosen; None without one.

    Seen on a random copy of the block, with as few real experts as a token needs and with nearly all: the choice and,
    bit for bit, the coefficients must be those of a router that cannot reach the others.
    """
    dims = block.dims
    if block.tables or dims.smallest_keep > dims.experts - dims.groups:
        return None
    counts = {dims.smallest_keep, dims.experts - dims.groups}
    for name, dim in block.per_expert_dims.items():
        if all(_keeps_away(block, name, dim, count, alone=alone, scale=scale) for count in counts):
            return name
    return None


def _keeps_away(block: _Block, name: str, dim: int, count: int, *, alone: bool, scale: float) -> bool:
    dims, module = block.dims, _lively_copy(block)
    real = places(count, dims.experts, dims.groups)
    padding = torch.tensor(sorted(set(range(dims.experts)) - set(real.tolist())))
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    if not tensors[name].is_floating_point():
        return False
    tensors[block.router_name].data.index_fill_(0, padding, 0.0)
    tensors[name].data.index_fill_(dim, padding, lowest(tensors[name].dtype))
    try:
        among, free = (routed(block, module, _tokens(block.hidden), which, alone, scale) for which in (real, None))
    except (CheckpointError, *NOT_RUN):
        return False
    return _same(among, free)


def reads_count(block: _Block, field: str, *, alone: bool, scale: float) -> bool:
    """Whether the block's routing depends on what the config says while it runs: it cannot have a count of its own.

    Args:
        field: the config's name for the count.
    """
    if block.tables:
        return False
    module = _lively_copy(block)
    configs = {id(part.config): part.config for part in module.modules() if hasattr(part, "config")}
    first = routed(block, module, _tokens(block.hidden), None, alone, scale)
    for config in configs.values():
        if hasattr(config, field):
            setattr(config, field, getattr(config, field) - 1)
    return not _same(first, routed(block, module, _tokens(block.hidden), None, alone, scale))


def _lively_copy(block: _Block) -> Any:
    """A random copy whose biases are small: where they decide alone, every token gets the same experts."""
    module = random_copy(block)
    tensors = dict((*module.named_parameters(), *module.named_buffers()))
    for name in block.per_expert_dims:
        tensors[name].data.mul_(0.05)
    return module


def padded(
    compressed: CompressedLayer, bank: ExpertBank, experts: int, bias: str, *, groups: int = 1
) -> CompressedLayer:
    """The layer with ``experts`` experts: in each of the router's groups, padding follows the real ones.

    Args:
        compressed: the real experts.
        bank: the layer that they were made from.
        experts: how many the layer is to have.
        bias: what `Block.padding` has found.
        groups: of the result's router.
    """
    place = places(len(compressed.router), experts, groups)

    def put(tensor: Tensor, dim: int = 0, fill: float | Tensor = 0.0) -> Tensor:
        shape = [experts if at == dim else size for at, size in enumerate(tensor.shape)]
        blank = tensor.new_zeros(shape)
        return (blank + fill).to(tensor.dtype).index_copy_(dim, place.to(tensor.device), tensor)

    def maybe(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else put(tensor)

    def entries(name: str, tensor: Tensor) -> Tensor:
        pairs = zip(tensor.shape, bank.per_expert[name].shape, strict=True)
        dim = next(at for at, (new, old) in enumerate(pairs) if new != old)
        return put(tensor, dim, lowest(tensor.dtype) if name == bias else tensor.narrow(dim, 0, 1))

    return CompressedLayer(
        layer=compressed.layer,
        gate=maybe(compressed.gate),
        up=put(compressed.up),
        down=put(compressed.down),
        gate_bias=maybe(compressed.gate_bias),
        up_bias=maybe(compressed.up_bias),
        down_bias=maybe(compressed.down_bias),
        router=put(compressed.router),
        per_expert={name: entries(name, tensor) for name, tensor in compressed.per_expert.items()},
    )


def places(kept: int, experts: int, groups: int) -> Tensor:
    """Where ``kept`` real experts lie among ``experts``: first in each of the router's groups."""
    within, starts = torch.arange(kept // groups), torch.arange(groups) * (experts // groups)
    return (starts[:, None] + within).flatten()


def check_padding(store: Store, blocks: Sequence[Block], counts: Sequence[int]) -> None:
    """Route random tokens with the routers of a finished checkpoint: no padding expert may take part.

    Raises:
        CheckpointError: one does.
    """
    for block, count in zip(blocks, counts, strict=True):
        if count < block.dims.experts:
            inside = sorted({name.rpartition(".")[0] for name in block.expert_tensors()})
            store.load_around(block.path, inside)
            refuse_chosen(block, count, store.model)
            store.unload(block.path)


def refuse_chosen(block: Block, count: int, model: Any) -> None:
    """As `check_padding`, for one block whose router is in memory; ``count`` of its experts are real."""
    dims: LayerDims = block.dims
    route, tokens = block.bank().route, _tokens(int(model.config.get_text_config().hidden_size))
    if route is None:
        raise CheckpointError(f"layer {dims.layer}: the adapter must give a route for padding. Got none instead.")
    if not _same(route(tokens, places(count, dims.experts, dims.groups)), route(tokens, None)):
        raise CheckpointError(
            f"layer {dims.layer}: padding experts must never be chosen, nor change what the others get. Got a router "
            f"that minds them instead. Use 'apply.export: dernkit'."
        )


def _tokens(hidden: int) -> Tensor:
    rng = torch.Generator().manual_seed(0)
    return torch.cat([size * torch.randn(_TOKENS, hidden, generator=rng) for size in _LOUDNESS])


def _same(one: Routing, other: Routing) -> bool:
    return torch.equal(one.chosen, other.chosen) and torch.equal(one.coefficients, other.coefficients)
