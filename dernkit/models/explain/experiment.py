"""A MoE block under experiment: a copy with random weights that is run, differentiated and changed piece by piece.

What a parameter is for is decided by what the block computes, not by what anything is called or how the code is
written. A graph (torch.export, torch.fx) of a block exists only where nothing depends on the data: loops over experts,
``nonzero`` and ``item`` end the export. An eager run has no such limits.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

SEED = 0


@dataclass(frozen=True)
class Slot:
    """A parameter or buffer, or the like-named ones of modules that are alike (``experts.*.w1.weight``) as one tensor
    with a first dimension that counts them.
    """

    name: str
    names: tuple[str, ...]
    parts: tuple[Tensor, ...]

    @property
    def stacked(self) -> bool:
        """Whether it is made of several modules' parameters."""
        return "*" in self.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole, stacked dimension included."""
        return (len(self.parts), *self.parts[0].shape) if self.stacked else tuple(self.parts[0].shape)

    def pieces(self, dim: int, index: int) -> list[Tensor]:
        """Views that make up one index along a dimension."""
        if not self.stacked:
            return [self.parts[0].data.select(dim, index)]
        return [self.parts[index].data] if dim == 0 else [part.data.select(dim - 1, index) for part in self.parts]

    def gather(self, values: Sequence[Tensor | None]) -> Tensor:
        """One tensor of `shape` from a value (or None: zeros) for each part."""
        full = [
            torch.zeros_like(part) if value is None else value for part, value in zip(self.parts, values, strict=True)
        ]
        return torch.stack(full) if self.stacked else full[0]


class Experiment:
    """A random float32 copy of ``block`` on the CPU and its random arguments.

    Args:
        block: on the meta device or real; it is not changed.
        args, kwargs: of one call. Floating-point tensors are replaced by random ones, shapes are kept; a first tensor
            [..., H] holds the tokens.

    Raises:
        Exception: whatever the block raises when it is run on them.
    """

    def __init__(self, block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        rng = torch.Generator().manual_seed(SEED)
        self.block: Any = _random_copy(block, rng)
        self.args = tree_map(lambda value: _random_input(value, rng), tuple(args))
        self.kwargs = tree_map(lambda value: _random_input(value, rng), kwargs)
        first = next(leaf for leaf in tree_leaves((self.args, self.kwargs)) if _is_float(leaf))
        self.tokens = first.numel() // first.shape[-1]
        self.slots = _slots(self.block)
        self.parameters = [slot for slot in self.slots if isinstance(slot.parts[0], nn.Parameter)]
        self.rng = rng
        with torch.no_grad():
            self.output = self.run()

    def run(self) -> Tensor:
        """The block's output as it is now: float [tokens, H]."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))  # caches among them remember their calls
        result = self.block(*args, **kwargs)
        for leaf in tree_leaves(result):
            if _is_float(leaf) and leaf.ndim > 1 and leaf.numel() % self.tokens == 0 and _rows(leaf, self.tokens):
                return leaf.reshape(self.tokens, -1)
        raise ValueError(f"no output with {self.tokens} tokens")

    def noise(self, shape: Sequence[int]) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, generator=self.rng)

    def moved(self) -> Tensor:
        """Which tokens' outputs differ from those of the unchanged block: bool [tokens]."""
        return self.differs(self.output)

    def differs(self, before: Tensor) -> Tensor:
        """Which tokens' outputs differ from ``before``: bool [tokens]."""
        with torch.no_grad():
            after = self.run()
        scale = before.abs().amax().clamp(min=1e-20)
        return ((after - before).abs().amax(dim=1) > 1e-6 * scale) | ~after.isfinite().all(dim=1)

    def gradients(self, cotangents: Sequence[tuple[int, Tensor]], slots: Sequence[Slot]) -> Iterator[list[Tensor]]:
        """For each (token, cotangent [H]): the gradients of cotangent · output[token], one tensor for each slot."""
        parts = [part for slot in slots for part in slot.parts]
        output = self.run()
        for token, cotangent in cotangents:
            found = list(torch.autograd.grad(output[token] @ cotangent, parts, retain_graph=True, allow_unused=True))
            yield [slot.gather([found.pop(0) for _ in slot.parts]) for slot in slots]


@contextmanager
def changed(pieces: Sequence[Tensor], deltas: Sequence[Tensor]) -> Iterator[None]:
    """The pieces hold their value plus a delta inside the ``with`` block, and their very bits after it."""
    before = [piece.clone() for piece in pieces]
    with torch.no_grad():
        for piece, delta in zip(pieces, deltas, strict=True):
            piece.add_(delta)
    try:
        yield
    finally:
        with torch.no_grad():
            for piece, value in zip(pieces, before, strict=True):
                piece.copy_(value)


def _rows(leaf: Tensor, tokens: int) -> bool:
    return torch.Size(leaf.shape[:-1]).numel() == tokens or leaf.shape[0] == tokens


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _random_input(value: Any, rng: torch.Generator) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.is_floating_point():
        return torch.randn(value.shape, generator=rng)
    if not value.is_meta:
        return value.clone()
    if value.dtype == torch.bool:
        return torch.ones(value.shape, dtype=torch.bool)
    return torch.randint(0, 64, value.shape, generator=rng, dtype=value.dtype)


def _random_copy(block: nn.Module, rng: torch.Generator) -> nn.Module:
    """Buffers that hold values stay; zeros and what lies on the meta device become random."""
    known = {name: buffer.clone() for name, buffer in block.named_buffers() if not buffer.is_meta}
    module = copy.deepcopy(block).to_empty(device="cpu").float().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(spread(parameter.shape) * torch.randn(parameter.shape, generator=rng))
            parameter.requires_grad_(True)
        for name, tensor in module.named_buffers():
            if name in known and bool(known[name].any()):
                tensor.copy_(known[name])
            elif tensor.is_floating_point():
                tensor.copy_(0.1 * torch.randn(tensor.shape, generator=rng))
            else:
                tensor.copy_(_choices(tensor, module, rng))
    return module


def _choices(table: Tensor, module: nn.Module, rng: torch.Generator) -> Tensor:
    """Different numbers of matrices in every row, as a table that chooses experts has them; else zeros."""
    stack = max((p for p in module.parameters() if p.ndim == 3), key=torch.numel, default=None)
    if table.ndim != 2 or stack is None or table.shape[1] > len(stack):
        return torch.zeros_like(table)
    order = torch.rand(len(table), len(stack), generator=rng).argsort(dim=1)
    return order[:, : table.shape[1]].to(table.dtype)


def spread(shape: Sequence[int]) -> float:
    """Standard deviation for which products with the matrix, from either side, neither vanish nor explode."""
    if len(shape) < 2:
        return 0.3
    return float((shape[-1] * shape[-2]) ** -0.25)


def _slots(block: nn.Module) -> list[Slot]:
    slots: list[Slot] = []
    inside: set[str] = set()
    for path, module in block.named_modules():
        if any(path == seen or path.startswith(f"{seen}.") for seen in inside):
            continue
        for names in _alike(module):
            prefix = f"{path}." if path else ""
            inside |= {prefix + name for name in names}
            members = {prefix + name: dict(_tensors(module.get_submodule(name))) for name in names}
            for leaf in members[prefix + names[0]]:
                parts = tuple(member[leaf] for member in members.values())
                slots.append(Slot(f"{prefix}*.{leaf}", tuple(f"{name}.{leaf}" for name in members), parts))
    single = [
        Slot(name, (name,), (tensor,))
        for name, tensor in _tensors(block)
        if not any(name.startswith(f"{seen}.") for seen in inside)
    ]
    return single + slots


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()


def _alike(module: nn.Module) -> list[list[str]]:
    """Names of children that have the same class and shapes, group by group: two in a container, four elsewhere."""
    groups: dict[Any, list[str]] = {}
    for name, child in module.named_children():
        shapes = tuple((leaf, tuple(tensor.shape)) for leaf, tensor in _tensors(child))
        if any(len(shape) > 1 for _, shape in shapes):
            groups.setdefault((type(child), shapes), []).append(name)
    fewest = 2 if isinstance(module, nn.ModuleList | nn.ModuleDict) else 4
    return [names for names in groups.values() if len(names) >= fewest]
