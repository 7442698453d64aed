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
        rest = list(self.slot.shape)
        rest[self.dim] = self.each
        return tuple(rest) if self.each > 1 else (*rest[: self.dim], *rest[self.dim + 1 :])

    def pieces(self, expert: int) -> list[Tensor]:
        """Views of one expert's part; together (stacked, if several) of `shape`."""
        if self.each == 1:
            return self.slot.pieces(self.dim, expert)
        return [self.slot.parts[0].data.narrow(self.dim, expert * self.each, self.each)]

    def part(self, full: Tensor, expert: int) -> Tensor:
        """One expert's part of a tensor that has the shape of the slot."""
        if self.each == 1:
            return full.select(self.dim, expert)
        return full.narrow(self.dim, expert * self.each, self.each)


@dataclass(frozen=True)
class Experts:
    """The parameters that have a part for each expert, and who uses which."""

    members: tuple[Member, ...]
    used: Tensor
    """bool [tokens, experts]: whether the token's output depends on the expert's part."""

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
    patterns: dict[tuple[int, bytes], list[tuple[Member, Tensor]]] = {}
    for (slot, dim), active in _activity(work).items():
        each = _run_length(active)
        if each > 1 and slot.stacked and dim == 0:
            continue
        used = active[:, ::each]
        if used.shape[1] < 2 or bool((used == used[:, :1]).all()):
            continue  # all slices alike: every token uses all of them
        key = (used.shape[1], used.numpy().tobytes())
        patterns.setdefault(key, []).append((Member(slot, dim, each), used))
    weighty = [found for found in patterns.values() if sum(_size(member) > 1 for member, _ in found) >= 2]
    if not weighty:
        return None
    # ReLU neurons are used by some tokens only as well, but by far more than an expert is.
    best = min(weighty, key=lambda found: float(found[0][1].float().mean()))
    return Experts(tuple(member for member, _ in best), best[0][1])


def _size(member: Member) -> int:
    return torch.Size(member.shape).numel()


def _activity(work: Experiment) -> dict[tuple[Slot, int], Tensor]:
    """(parameter, dimension) -> bool [tokens, length]: whether the token's output depends on the slice."""
    slots = work.parameters
    tests = [(token, work.noise(work.output.shape[1:])) for token in range(work.tokens)]
    rows: dict[tuple[Slot, int], list[Tensor]] = {}
    for gradients in work.gradients(tests, slots):
        for slot, gradient in zip(slots, gradients, strict=True):
            size = gradient.abs()
            floor = 1e-6 * size.max() if size.numel() else size.sum()
            for dim in range(size.ndim):
                others = [d for d in range(size.ndim) if d != dim]
                largest = size.amax(dim=others) if others else size
                rows.setdefault((slot, dim), []).append(largest > floor)
    return {key: torch.stack(found) for key, found in rows.items()}


def _run_length(active: Tensor) -> int:
    """How many neighbouring slices always go together."""
    columns = [bytes(column.tolist()) for column in active.T]
    return gcd(*(len(list(run)) for _, run in groupby(columns)))
