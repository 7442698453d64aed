"""Which expert matrices come before the neurons and which behind them, and how they lie.

The gradient of one token's output has rank one in every matrix that the token meets once. One of its factors is what
goes into the matrix and does not depend on which output is asked about; the other one comes back from that output.
What goes into the down projection depends on the experts' other matrices; what goes into gate and up does not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dernkit.models.explain.experiment import Experiment, changed, spread
from dernkit.models.explain.experts import Experts, Member


@dataclass(frozen=True)
class Matrix:
    """One expert's [a, b] of a parameter, and how it is used."""

    member: Member
    reads: int
    """Which of the two dimensions meets the matrix's input."""

    @property
    def inputs(self) -> int:
        return self.member.matrix_shape[self.reads]

    @property
    def outputs(self) -> int:
        return self.member.matrix_shape[1 - self.reads]

    @property
    def transposed(self) -> bool:
        """Whether it lies [inputs, outputs], not [outputs, inputs] as ``nn.Linear`` has it."""
        return self.reads == 0

    def row(self, expert: int, index: int) -> Tensor:
        """A view of what makes one output."""
        piece = self.member.matrix(expert)
        return piece[:, index] if self.transposed else piece[index]


@dataclass(frozen=True)
class Matrices:
    """Expert matrices in the order of computation."""

    rows: tuple[Matrix, ...]
    downs: tuple[Matrix, ...]
    unexplained: tuple[str, ...]


def find_matrices(work: Experiment, experts: Experts, members: list[Member]) -> Matrices:
    """Tell what comes before the neurons from what comes behind them."""
    rows: list[Matrix] = []
    downs: list[Matrix] = []
    unexplained: list[str] = []
    for member in members:
        found = _agreed(work, experts, member, members)
        if found is None:
            unexplained.append(f"'{member.name}' is not used as a matrix that a token meets once")
        else:
            (downs if found[1] else rows).append(Matrix(member, found[0]))
    return Matrices(tuple(rows), tuple(downs), tuple(unexplained))


def _agreed(work: Experiment, experts: Experts, member: Member, members: list[Member]) -> tuple[int, bool] | None:
    """(dimension that meets the input, whether the input depends on the other matrices), if two tokens agree on it."""
    votes: list[tuple[int, bool]] = []
    for token, expert in experts.examples(8):
        vote = _use(work, member, members, token, expert)
        if vote is not None:
            votes.append(vote)
        if len(votes) == 2:
            return votes[0] if votes[0] == votes[1] else None
    return None


def _use(work: Experiment, member: Member, members: list[Member], token: int, expert: int) -> tuple[int, bool] | None:
    cotangents = [work.noise(work.output.shape[1:]) for _ in range(2)]
    first, second = (factors(gradient(work, member, token, expert, cotangent)) for cotangent in cotangents)
    if first is None or second is None:
        return None
    long = [dim for dim, length in enumerate(member.matrix_shape) if length > 1]
    same = [dim for dim in long if parallel(first[dim], second[dim])]
    if len(long) == 1:  # one neuron: the vector either reads or writes
        return (long[0], False) if same else (1 - long[0], True)
    if len(same) != 1:
        return None
    others = [other.matrix(expert) for other in members if other is not member]
    with changed(others, [spread(other.shape) * work.noise(other.shape) for other in others]):
        after = factors(gradient(work, member, token, expert, cotangents[0]))
    return None if after is None else (same[0], not parallel(first[same[0]], after[same[0]]))


def gradient(work: Experiment, member: Member, token: int, expert: int, cotangent: Tensor) -> Tensor:
    """Gradient [a, b] of cotangent · output[token] in one expert's part."""
    (full,) = next(work.gradients([(token, cotangent)], [member.slot]))
    return member.part(full, expert)


def factors(product: Tensor) -> tuple[Tensor, Tensor] | None:
    """Column and row factor of a matrix of rank one; None when it is not of rank one."""
    i, j = divmod(int(product.abs().argmax()), product.shape[1])
    column, row, peak = product[:, j], product[i], product[i, j]
    if peak == 0 or (product - torch.outer(column, row) / peak).abs().max() > 1e-3 * peak.abs():
        return None
    return column.clone(), row.clone()


def parallel(a: Tensor, b: Tensor) -> bool:
    """Whether two vectors have one direction, up to the sign."""
    return bool((a.flatten() @ b.flatten()).abs() > 0.999 * a.norm() * b.norm())
