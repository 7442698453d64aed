"""Which rows and columns of an expert's matrices make one neuron, and which rows are gate and which are up.

A neuron's output is linear in its up row (or at least odd, where the pre-activation is capped softly), and neither in
its gate row: SiLU, GELU, sigmoid and ReLU are not odd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dernkit.models.explain.experiment import Experiment, changed, spread
from dernkit.models.explain.experts import Experts, Member
from dernkit.models.explain.matrices import Matrices, Matrix, factors, gradient, parallel

_STEPS = (-2.0, 1.0, 3.0)
_ROWS = 12


@dataclass(frozen=True)
class Neurons:
    """What was found about the experts' insides."""

    order: str
    """separate, concatenated or interleaved, with ``up first,`` before it where up comes first; or no gate."""
    roles: Mapping[str, str]
    """Parameter -> gate, up, gate and up, down, gate bias, ..."""
    coefficients: tuple[str, ...]
    """Parameters with a vector for each expert whose only work is to weigh the expert's output."""
    unexplained: tuple[str, ...]


def find_neurons(work: Experiment, experts: Experts, matrices: Matrices, vectors: list[Member]) -> Neurons:
    """The roles of the matrices (one of them behind the neurons) and of what has a vector for each expert."""
    search = _Search(work, experts, matrices)
    search.name_rows()
    for member in vectors:
        search.name_vector(member)
    return Neurons(search.order, search.roles, tuple(search.coefficients), tuple(search.unexplained))


class _Search:
    def __init__(self, work: Experiment, experts: Experts, matrices: Matrices) -> None:
        self.work, self.experts = work, experts
        self.rows, (self.down,) = matrices.rows, matrices.downs
        self.order = "unknown"
        self.roles = {self.down.member.name: "down"}
        self.coefficients: list[str] = []
        self.unexplained: list[str] = []

    def name_rows(self) -> None:
        """Which matrix, or which part of it, is gate and which is up."""
        width = self.down.inputs
        lengths = [matrix.outputs for matrix in self.rows]
        kinds = [self._row_kinds(matrix) for matrix in self.rows]
        names = " and ".join(f"'{matrix.member.name}'" for matrix in self.rows)
        if lengths == [width] and _in_order(kinds[0]):
            self.order, self.roles[self.rows[0].member.name] = "no gate", "up"
        elif lengths == [width, width] and all(map(_in_order, kinds)):
            self._name_separate(kinds)
        elif lengths == [2 * width]:
            self.order = _order(kinds[0], width)
            self.roles[self.rows[0].member.name] = "gate and up"
        if self.order == "unknown":
            self.unexplained.append(f"how {lengths} rows of {names or 'no matrix'} make {width} neurons")

    def _name_separate(self, kinds: list[dict[int, tuple[int, bool]]]) -> None:
        straight = [{linear for _, linear in kind.values()} for kind in kinds]
        if straight in ([{False}, {True}], [{True}, {False}]):
            self.order = "separate"
            for matrix, linear in zip(self.rows, straight, strict=True):
                self.roles[matrix.member.name] = "up" if True in linear else "gate"

    def _row_kinds(self, matrix: Matrix) -> dict[int, tuple[int, bool]]:
        """Sampled row -> (neuron, whether the neuron's output is linear or odd in the row). (-1, False): not found."""
        sampled = torch.linspace(0, matrix.outputs - 1, min(_ROWS, matrix.outputs)).round().long().tolist()
        return {row: self._row_kind(matrix, row) for row in sorted({*sampled, min(1, matrix.outputs - 1)})}

    def _row_kind(self, matrix: Matrix, row: int) -> tuple[int, bool]:
        for token, expert in self.experts.examples(6):
            found = factors(gradient(self.work, matrix.member, token, expert, self._cotangent(token)))
            if found is None:
                continue
            direction = found[matrix.reads] / found[matrix.reads].norm()
            step = spread(matrix.member.matrix_shape) * direction
            kind = self._effect(token, expert, matrix.row(expert, row), step)
            if kind is not None:
                return kind
        return -1, False

    def _effect(self, token: int, expert: int, piece: Tensor, step: Tensor) -> tuple[int, bool] | None:
        """(the one neuron that changes with the piece, whether in proportion or oddly); None unless it is just one."""
        back, before = self._neurons(token, expert)

        def after(delta: Tensor) -> Tensor:
            with changed([piece], [delta]):
                return _aligned(self._neurons(token, expert, back)[1], before)

        slopes = torch.stack([(after(size * step) - before) / size for size in _STEPS])
        largest = slopes.abs().amax(dim=0)
        neuron = int(largest.argmax())
        rest = largest.clone().index_fill_(0, torch.tensor(neuron), 0)
        if largest[neuron] < 1e-5 * before.abs().max() or rest.max() > 1e-2 * largest[neuron]:
            return None
        if slopes[:, neuron].max() - slopes[:, neuron].min() < 1e-2 * largest[neuron]:
            return neuron, True
        plus, minus = (float(after(size * step - piece)[neuron]) for size in (3, -3))
        return neuron, abs(plus + minus) < 1e-2 * abs(plus)

    def _neurons(self, token: int, expert: int, back: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(direction ``back``, neuron activations up to a factor) of one token in one expert, from down's gradient."""
        product = gradient(self.work, self.down.member, token, expert, self._cotangent(token))
        product = product.T if self.down.transposed else product
        if back is None:
            back = product[:, int(product.abs().amax(dim=0).argmax())].clone()
        return back, (back @ product) / (back @ back).clamp(min=1e-30)

    def _cotangent(self, token: int) -> Tensor:
        return torch.randn(self.work.output.shape[1], generator=torch.Generator().manual_seed(token))

    def name_vector(self, member: Member) -> None:
        """A bias of the neurons, a bias of the output, or something that weighs the expert's output."""
        if member.size == 1:
            self.coefficients.append(member.name)
            return
        for token, expert in self.experts.examples(6):
            cotangents = (self.work.noise(self.work.output.shape[1:]) for _ in range(2))
            first, second = (gradient(self.work, member, token, expert, cotangent) for cotangent in cotangents)
            if bool(first.any()) and bool(second.any()):
                if parallel(first, second):
                    self.coefficients.append(member.name)
                else:
                    self._name_bias(member, token, expert)
                return
        self.unexplained.append(f"what '{member.name}' is for")

    def _name_bias(self, member: Member, token: int, expert: int) -> None:
        piece = member.matrix(expert).flatten()
        found = self._effect(token, expert, piece[:1], torch.ones(1))
        if found is None and member.size == self.down.outputs:
            self.roles[member.name] = "down bias"
            return
        # Of two matrices with equally many rows, a bias belongs to the one that acts as it does.
        for matrix in self.rows:
            alike = len(self.rows) == 1 or (
                found is not None and found[1] == (self.roles.get(matrix.member.name) == "up")
            )
            if found is not None and matrix.outputs == member.size and alike:
                self.roles[member.name] = f"{self.roles.get(matrix.member.name, 'row')} bias"
                return
        self.unexplained.append(f"what '{member.name}' is for")


def _aligned(after: Tensor, before: Tensor) -> Tensor:
    """A norm behind the experts rescales all neurons' gradients: most of them tell by how much."""
    if len(before) < 3:
        return after
    there = before.abs() > 1e-3 * before.abs().max()
    factor = (after[there] / before[there]).median()
    return after / factor if bool(factor != 0) else after


def _in_order(kinds: dict[int, tuple[int, bool]]) -> bool:
    return all(neuron == row for row, (neuron, _) in kinds.items())


def _order(kinds: dict[int, tuple[int, bool]], width: int) -> str:
    places = {"concatenated": lambda row: divmod(row, width)[::-1], "interleaved": lambda row: divmod(row, 2)}
    for name, place in places.items():
        if all(neuron == place(row)[0] for row, (neuron, _) in kinds.items()):
            parts = [{linear for row, (_, linear) in kinds.items() if place(row)[1] == part} for part in (0, 1)]
            if parts == [{False}, {True}]:
                return name
            if parts == [{True}, {False}]:
                return f"up first, {name}"
    return "unknown"
