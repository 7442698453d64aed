"""Which parameters are experts': a slice that only some tokens' outputs depend on belongs to the expert they chose."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from math import gcd

import torch
from torch import Tensor

from dernkit.models.explain.experiment import Experiment, Slot


@dataclass(frozen=True)
class Member:
    """A parameter with a part for each expert."""

    slot: Slot
    dim: int
    """Dimension of ``slot.shape`` that counts experts."""
    each: int
    """Entries of that dimension for each expert: more than 1 where experts and their neurons share it."""

    @property
    def name(self) -> str:
        return self.slot.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one expert's part."""
        rest = (*self.slot.shape[: self.dim], *self.slot.shape[self.dim + 1 :])
        return (*rest[: self.dim], self.each, *rest[self.dim :]) if self.each > 1 else rest

    @property
    def size(self) -> int:
        """Numbers for each expert."""
        return torch.Size(self.shape).numel()

    @property
    def is_matrix(self) -> bool:
        """Whether an expert's part has two dimensions worth the name."""
        return sum(length > 1 for length in self.shape) == 2

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """`shape` as a matrix; a vector [n] is a row [1, n]."""
        long = [length for length in self.shape if length > 1]
        return (long[0], long[1]) if len(long) == 2 else (1, self.size)

    def matrix(self, expert: int) -> Tensor:
        """A view [a, b] of one expert's part."""
        if self.each > 1:
            piece = self.slot.parts[0].data.narrow(self.dim, expert * self.each, self.each)
        else:
            (piece,) = self.slot.pieces(self.dim, expert)
        piece = piece.squeeze()
        return piece if piece.ndim == 2 else piece.reshape(1, -1)

    def part(self, full: Tensor, expert: int) -> Tensor:
        """One expert's part [a, b] of a tensor that has the shape of the slot."""
        return full.narrow(self.dim, expert * self.each, self.each).reshape(self.matrix_shape)


@dataclass(frozen=True)
class Experts:
    """The parameters that have a part for each expert, and who uses which."""

    members: tuple[Member, ...]
    used: Tensor
    """bool [tokens, experts]: whether the token's output depends on the expert's part."""
    uneven: tuple[str, ...]
    """Other parameters with slices that only tokens of one expert use."""

    @property
    def count(self) -> int:
        return int(self.used.shape[1])

    def examples(self, most: int) -> list[tuple[int, int]]:
        """Pairs of a token and an expert that it uses, of different experts before several of one."""
        pairs = []
        for rank in range(most):
            for expert in self.used.sum(dim=0).argsort(descending=True, stable=True).tolist():
                tokens = self.used[:, expert].nonzero().flatten()
                if rank < len(tokens):
                    pairs.append((int(tokens[rank]), expert))
        return pairs[:most]


def find_experts(work: Experiment) -> Experts | None:
    """The largest set of parameters whose slices are used by the same few tokens; None when there is none."""
    patterns: dict[bytes, list[tuple[Member, Tensor]]] = {}
    activity = _activity(work)
    for (slot, dim), active in activity.items():
        each = _run_length(active)
        if slot.stacked and (each > 1 or dim > 0):
            continue
        used = active[:, ::each]
        if used.shape[1] < 2 or bool((used == used[:, :1]).all()):
            continue  # all slices alike: every token uses all of them
        patterns.setdefault(_pattern(used), []).append((Member(slot, dim, each), used))
    weighty = [found for found in patterns.values() if sum(member.size > 1 for member, _ in found) >= 2]
    routed = [found for found in weighty if _is_routed(found[0][1])]
    if not routed:
        return None
    best = min(routed, key=lambda found: float(found[0][1].float().mean()))
    used = min((used for _, used in best), key=lambda used: used.shape[1])
    names = {member.name for member, _ in best}
    uneven = {slot.name for (slot, _), active in activity.items() if _within(active, used)} - names
    return Experts(tuple(member for member, _ in best), used, tuple(sorted(uneven)))


def _within(active: Tensor, used: Tensor) -> bool:
    """Whether each slice is used only by tokens of one expert, if by any."""
    slices = active[:, active.any(dim=0)]
    fits = (slices[:, :, None] <= used[:, None, :]).all(dim=0).any(dim=1)
    return slices.shape[1] > 0 and bool(fits.all()) and not bool(slices.all(dim=0).any())


def _pattern(used: Tensor) -> bytes:
    """The same for parameters of which one has entries at the end that no token ever uses."""
    last = int(used.any(dim=0).nonzero().max()) if bool(used.any()) else -1
    return bytes(used[:, : last + 1].flatten().tolist())


def _is_routed(used: Tensor) -> bool:
    """Tokens use equally many experts, most of the time; ReLU neurons are used by some tokens only as well, but by
    anyhow many.
    """
    counts = used.sum(dim=1)
    return bool(counts.bincount().max() >= len(counts) / 3)


def _activity(work: Experiment) -> dict[tuple[Slot, int], Tensor]:
    """(parameter, dimension) -> bool [tokens, length]: whether the token's output depends on the slice."""
    slots = work.parameters
    tests = [(token, work.noise(work.output.shape[1:])) for token in range(work.tokens)]
    rows: dict[tuple[Slot, int], list[Tensor]] = {}
    for gradients in work.gradients(tests, slots):
        for slot, gradient in zip(slots, gradients, strict=True):
            size = gradient.abs()
            floor = 1e-12 * size.max() if size.numel() else size.sum()
            for dim in range(size.ndim):
                others = [d for d in range(size.ndim) if d != dim]
                largest = size.amax(dim=others) if others else size
                rows.setdefault((slot, dim), []).append(largest > floor)
    return {key: torch.stack(found) for key, found in rows.items()}


def _run_length(active: Tensor) -> int:
    """How many neighbouring slices always go together."""
    columns = [bytes(column.tolist()) for column in active.T]
    return gcd(*(len(list(run)) for _, run in groupby(columns)))
