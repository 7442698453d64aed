"""What each expert matrix does: which are gate rows, up rows and down columns, and which of them make one neuron.

The gradient of one token's output is of rank one in every matrix that the token passes through once. One factor is what
goes into the matrix and does not depend on which output is asked about; the other comes back from the output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dernkit.models.explain.experiment import Experiment, _spread, changed
from dernkit.models.explain.experts import Experts, Member

_STEPS = (-2.0, 1.0, 3.0)
_SAMPLED_ROWS = 12


@dataclass(frozen=True)
class Matrix:
    """One expert matrix [a, b] and how it is used."""

    member: Member
    reads: int
    """Which of the two dimensions meets the matrix's input."""

    @property
    def inputs(self) -> int:
        return self.member.shape[self.reads]

    @property
    def outputs(self) -> int:
        return self.member.shape[1 - self.reads]

    @property
    def transposed(self) -> bool:
        """Whether it lies [inputs, outputs], not [outputs, inputs] as ``nn.Linear`` has it."""
        return self.reads == 0


@dataclass
class Neurons:
    """What was found about the experts' insides."""

    rows: list[Matrix] = field(default_factory=list)
    down: Matrix | None = None
    order: str | None = None
    """separate, concatenated, interleaved (prefixed by ``up first,`` where up comes first), or no gate."""
    roles: dict[str, str] = field(default_factory=dict)
    """Parameter -> gate, up, gate and up, down, gate bias, ..."""
    like_router: list[str] = field(default_factory=list)
    """Parameters with a vector for each expert that weighs the expert's output."""
    unexplained: list[str] = field(default_factory=list)


def find_neurons(work: Experiment, experts: Experts) -> Neurons:
    """Roles of all parameters that have a part for each expert."""
    return _Search(work, experts).found


class _Search:
    def __init__(self, work: Experiment, experts: Experts) -> None:
        self.work, self.experts = work, experts
        self.found = Neurons()
        self.matrices = [member for member in experts.members if len(member.shape) == 2]
        self.vectors = [member for member in experts.members if len(member.shape) < 2]
        for member in experts.members:
            if len(member.shape) > 2:
                self.found.unexplained.append(f"'{member.name}' has {len(member.shape)} dimensions for each expert")
        self._use_matrices()
        if self.found.down is not None and self.found.rows:
            self._pair_rows()
        self._use_vectors()

    def _use_matrices(self) -> None:
        for member in self.matrices:
            reads = self._agreed(member)
            if reads is None:
                self.found.unexplained.append(f"'{member.name}' is not used as a matrix that every token meets once")
            elif reads[1]:
                if self.found.down is not None:
                    self.found.unexplained.append(f"'{member.name}' is a second matrix behind the neurons")
                self.found.down = Matrix(member, reads[0])
                self.found.roles[member.name] = "down"
            else:
                self.found.rows.append(Matrix(member, reads[0]))

    def _agreed(self, member: Member) -> tuple[int, bool] | None:
        """(dimension that meets the input, whether that input depends on the other matrices): two witnesses agree."""
        votes = []
        for token, expert in self.experts.examples(8):
            vote = self._reads(member, token, expert)
            if vote is not None:
                votes.append(vote)
            if len(votes) == 2:
                break
        return votes[0] if len(votes) == 2 and votes[0] == votes[1] else None

    def _reads(self, member: Member, token: int, expert: int) -> tuple[int, bool] | None:
        cotangents = [self.work.noise(self.work.output.shape[1:]) for _ in range(2)]
        first, second = (_factors(self._gradient(member, token, expert, v)) for v in cotangents)
        if first is None or second is None:
            return None
        same = [dim for dim in (0, 1) if _parallel(first[dim], second[dim])]
        if len(same) != 1:
            return None
        others = [piece for other in self.matrices if other is not member for piece in other.pieces(expert)]
        with changed(others, [_spread(piece.shape) * self.work.noise(piece.shape) for piece in others]):
            after = _factors(self._gradient(member, token, expert, cotangents[0]))
        return None if after is None else (same[0], not _parallel(first[same[0]], after[same[0]]))

    def _gradient(self, member: Member, token: int, expert: int, cotangent: Tensor) -> Tensor:
        (gradient,) = next(self.work.gradients([(token, cotangent)], [member.slot]))
        return member.part(gradient, expert)

    def _pair_rows(self) -> None:
        """Which row belongs to which neuron, and whether a neuron's output is linear in it (then it is an up row)."""
        rows, width = self.found.rows, self.found.down.inputs  # type: ignore[union-attr]
        kinds = [self._row_kinds(matrix) for matrix in rows]
        lengths = [matrix.outputs for matrix in rows]
        if lengths == [width]:
            self._name(rows, kinds, lambda row: row, ["up"], "no gate", linear=None)
        elif lengths == [2 * width]:
            order = _order(kinds[0], width)
            if order is None:
                self.found.unexplained.append(f"'{rows[0].member.name}': rows pair neither as halves nor in turns")
                return
            self.found.order = order
            self.found.roles[rows[0].member.name] = "gate and up"
        elif lengths == [width, width]:
            self._name(rows, kinds, lambda row: row, ["gate", "up"], "separate", linear=True)
        else:
            self.found.unexplained.append(f"matrices with {lengths} rows for {width} neurons")

    def _name(self, rows, kinds, column, names, order, *, linear) -> None:  # type: ignore[no-untyped-def]
        for matrix, kind in zip(rows, kinds, strict=True):
            if any(found is None or found[0] != column(row) for row, found in kind.items()):
                self.found.unexplained.append(f"'{matrix.member.name}': rows do not belong to neurons in their order")
                return
        if linear is None:
            self.found.order, self.found.roles[rows[0].member.name] = order, names[0]
            return
        straight = [all(found[1] for found in kind.values()) for kind in kinds]
        bent = [not any(found[1] for found in kind.values()) for kind in kinds]
        if not (straight[0] and bent[1] or straight[1] and bent[0]):
            self.found.unexplained.append("which of two matrices is the gate and which is up")
            return
        self.found.order = order
        for matrix, is_up in zip(rows, straight, strict=True):
            self.found.roles[matrix.member.name] = "up" if is_up else "gate"

    def _row_kinds(self, matrix: Matrix) -> dict[int, tuple[int, bool] | None]:
        """Sampled row -> (neuron, whether the neuron's output is affine in the row)."""
        chosen = torch.linspace(0, matrix.outputs - 1, min(_SAMPLED_ROWS, matrix.outputs)).round().long().tolist()
        picked = sorted({*chosen, min(1, matrix.outputs - 1)})
        return {row: self._row_kind(matrix, row) for row in picked}

    def _row_kind(self, matrix: Matrix, row: int) -> tuple[int, bool] | None:
        for token, expert in self.experts.examples(6):
            cotangent = self.work.noise(self.work.output.shape[1:])
            factors = _factors(self._gradient(matrix.member, token, expert, cotangent))
            if factors is None:
                continue
            direction = factors[matrix.reads] / factors[matrix.reads].norm()
            step = _spread(matrix.member.shape) * direction
            views = _rows_of(matrix, expert)
            kind = self._effect(token, expert, [view[row] for view in views], [step])
            if kind is not None:
                return kind
        return None

    def _effect(self, token: int, expert: int, pieces: Sequence[Tensor], steps: Sequence[Tensor]) -> tuple[int, bool] | None:
        """(the one neuron whose output changes, whether it changes in proportion); None when none or several do."""
        seen = self._neurons(token, expert)
        if seen is None:
            return None
        back, before = seen
        slopes = []
        for size in _STEPS:
            with changed(pieces, [size * step for step in steps]):
                after = self._neurons(token, expert, back)
            slopes.append((after[1] - before) / size)  # type: ignore[index]
        moves = torch.stack(slopes)
        largest = moves.abs().amax(dim=0)
        column = int(largest.argmax())
        if largest[column] < 1e-5 * before.abs().max() or largest.sort().values[-2] > 1e-2 * largest[column]:
            return None
        spread = moves[:, column].max() - moves[:, column].min()
        return column, bool(spread < 1e-2 * largest[column])

    def _neurons(self, token: int, expert: int, back: tuple[Tensor, Tensor] | None = None) -> tuple[Any, Tensor] | None:
        """Neuron activations of one token in one expert, up to a factor that stays the same with ``back``."""
        down = self.found.down
        assert down is not None
        rng = torch.Generator().manual_seed(token)
        cotangent = torch.randn(self.work.output.shape[1], generator=rng)
        gradient = self._gradient(down.member, token, expert, cotangent)
        if back is None:
            factors = _factors(gradient)
            if factors is None:
                return None
            back = factors[1 - down.reads]
        along = gradient if down.reads == 1 else gradient.T
        return back, (back @ along) / (back @ back)

    def _use_vectors(self) -> None:
        for member in self.vectors:
            if member.shape == () or member.shape == (1,):
                self.found.roles[member.name] = "scale"
                continue
            self._use_vector(member)

    def _use_vector(self, member: Member) -> None:
        for token, expert in self.experts.examples(6):
            first, second = (
                self._gradient(member, token, expert, self.work.noise(self.work.output.shape[1:])) for _ in range(2)
            )
            if not first.any() or not second.any():
                continue
            if _parallel(first, second):
                self.found.like_router.append(member.name)
                return
            self.found.roles[member.name] = self._bias_role(member, token, expert)
            return
        self.found.unexplained.append(f"'{member.name}' has no effect")

    def _bias_role(self, member: Member, token: int, expert: int) -> str:
        down = self.found.down
        if down is None or not self.found.rows:
            return "bias"
        piece = member.pieces(expert)[0]
        if self._effect(token, expert, [piece[:1]], [torch.ones(1)]) is None:
            return "down bias" if member.shape[0] == down.outputs else "bias"
        for matrix in self.found.rows:
            if matrix.outputs == member.shape[0]:
                return f"{self.found.roles.get(matrix.member.name, 'row')} bias"
        return "bias"


def _rows_of(matrix: Matrix, expert: int) -> list[Tensor]:
    """The expert's matrix as [outputs, inputs]."""
    (piece,) = matrix.member.pieces(expert)
    return [piece.T if matrix.transposed else piece]


def _order(kinds: dict[int, tuple[int, bool] | None], width: int) -> str | None:
    for name, place in (("concatenated", lambda r: (r % width, r // width)), ("interleaved", lambda r: divmod(r, 2))):
        if all(found is not None and found[0] == place(row)[0] for row, found in kinds.items()):
            linear = {part: {found[1] for row, found in kinds.items() if place(row)[1] == part} for part in (0, 1)}  # type: ignore[index]
            if linear == {0: {False}, 1: {True}}:
                return name
            if linear == {0: {True}, 1: {False}}:
                return f"up first, {name}"
    return None


def _factors(gradient: Tensor) -> tuple[Tensor, Tensor] | None:
    """Column and row factor of a matrix of rank one; None when it is not of rank one."""
    at = int(gradient.abs().argmax())
    i, j = divmod(at, gradient.shape[1])
    peak = gradient[i, j]
    if peak == 0:
        return None
    column, row = gradient[:, j], gradient[i]
    if (gradient - torch.outer(column, row) / peak).abs().max() > 1e-3 * peak.abs():
        return None
    return column.clone(), row.clone()


def _parallel(a: Tensor, b: Tensor) -> bool:
    return bool((a @ b).abs() > 0.999 * a.norm() * b.norm())
