"""What decides which experts a token uses: the router's matrix, biases, scales and tables of expert ids."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dernkit.models.explain.experiment import Experiment, Slot, changed, spread
from dernkit.models.explain.experts import Experts, Member

_SAMPLED = 4


@dataclass
class Choice:
    """What was found about the routing."""

    routers: list[tuple[str, int]] = field(default_factory=list)
    """(matrix, its rows)."""
    choice_biases: list[str] = field(default_factory=list)
    logit_biases: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    upstream: list[str] = field(default_factory=list)
    """What influences the choice without having an entry for each expert."""


def find_choice(work: Experiment, experts: Experts, witness: Member, known: Collection[str]) -> Choice:
    """Change everything but the experts, and see which tokens choose other experts then.

    Args:
        witness: the expert matrix that tells who uses an expert; best the down projection.
        known: parameters whose role is known; they are left alone.
    """
    return _Search(work, experts, witness, known).found


class _Search:
    def __init__(self, work: Experiment, experts: Experts, witness: Member, known: Collection[str]) -> None:
        self.work, self.experts, self.witness = work, experts, witness
        self.found = Choice()
        self.at_once = False
        self.usual = self.chosen()
        self.at_once = self._one_run_tells()
        slots = [slot for slot in work.slots if slot.name not in known]
        vectors = [
            slot for slot in slots if max(slot.shape, default=1) == slot.parts[0].numel() * (len(slot.parts) or 1)
        ]
        for slot in vectors:
            self._try(slot)
        # With biases a softmax lets one expert's row decide about others: all share a sum of one.
        biases = [part.data for slot in vectors if slot.name in self.found.choice_biases for part in slot.parts]
        with changed(biases, [-bias for bias in biases]):
            self.usual = self.chosen()
            for slot in slots:
                if slot not in vectors:
                    self._try(slot)

    def chosen(self) -> Tensor:
        """bool [tokens, experts]: a token uses an expert if its output changes with the expert's matrix."""
        with torch.no_grad():
            before = self.work.run()
        if self.at_once:
            return self._all_at_once(before)
        columns = []
        for expert in range(self.experts.count):
            piece = self.witness.matrix(expert)
            with changed([piece], [spread(piece.shape) * self.work.noise(piece.shape)]):
                columns.append(self.work.differs(before))
        return torch.stack(columns, dim=1)

    def _all_at_once(self, before: Tensor) -> Tensor:
        """The same from one run: expert e's down projection changes in output e alone."""
        pieces = [self.witness.matrix(expert) for expert in range(self.experts.count)]
        deltas = [torch.zeros_like(piece) for piece in pieces]
        for expert, delta in enumerate(deltas):
            row = delta[expert] if delta.shape[0] == before.shape[1] else delta[:, expert]
            row.copy_(spread(delta.shape) * self.work.noise(row.shape))
        with changed(pieces, deltas), torch.no_grad():
            after = self.work.run()
        return (after - before)[:, : self.experts.count].abs() > 1e-6 * before.abs().max()

    def _one_run_tells(self) -> bool:
        """Whether `_all_at_once` may be used: the witness writes the outputs, and nothing behind it mixes them."""
        lengths = self.witness.matrix_shape
        outputs = self.work.output.shape[1]
        if lengths.count(outputs) != 1 or self.experts.count > outputs:
            return False
        with torch.no_grad():
            return bool((self._all_at_once(self.work.run()) == self.usual).all())

    def _try(self, slot: Slot) -> None:
        if not slot.parts[0].is_floating_point():
            if slot.parts[0].numel() > 1 and self._changes(
                slot.parts, [_shifted(part, self.experts.count) for part in slot.parts]
            ):
                self.found.tables.append(slot.name)
            return
        if not self._changes(slot.parts, [self._shock(part) for part in slot.parts]):
            return
        dims = [
            dim for dim, length in enumerate(slot.shape) if length >= self.experts.count and self._one_each(slot, dim)
        ]
        if len(dims) != 1:
            self.found.upstream.append(slot.name)
            return
        rest = [length for dim, length in enumerate(slot.shape) if dim != dims[0] and length > 1]
        if len(rest) == 1:
            self.found.routers.append((slot.name, slot.shape[dims[0]]))
        elif rest:
            self.found.upstream.append(slot.name)
        elif self._only_choice(slot):
            self.found.choice_biases.append(slot.name)
        else:
            self.found.logit_biases.append(slot.name)

    def _shock(self, tensor: Tensor) -> Tensor:
        return 5 * spread(tensor.shape) * self.work.noise(tensor.shape)

    def _changes(self, pieces: Sequence[Tensor], deltas: Sequence[Tensor]) -> bool:
        with changed([piece.data for piece in pieces], deltas):
            return bool((self.chosen() & ~self.usual).any())  # joined; small contributions may drown

    def _one_each(self, slot: Slot, dim: int) -> bool:
        """Whether changing entry i along the dimension lets tokens take up or give up expert i, and others only then.

        Others may disappear without it: their coefficients vanish beside a very large one.
        """
        hits = misses = 0
        for index in torch.linspace(0, self.experts.count - 1, _SAMPLED).round().long().unique().tolist():
            pieces = slot.pieces(dim, index)
            for sign in (1, -1):
                deltas = [
                    sign * (self._shock(piece) if piece.numel() > 1 else torch.full_like(piece, 5.0))
                    for piece in pieces
                ]
                with changed(pieces, deltas):
                    now = self.chosen()
                own = now[:, index] != self.usual[:, index]
                hits += int(own.sum())
                misses += int(((now & ~self.usual).any(dim=1) & ~own).sum())
                if misses > 2 + hits:
                    return False
        return hits > 0 and misses <= 0.1 * hits

    def _only_choice(self, slot: Slot) -> bool:
        """Whether a change that is too small for another choice changes nothing."""
        deltas = [1e-3 * self.work.noise(part.shape) for part in slot.parts]
        with changed([part.data for part in slot.parts], deltas):
            same = (self.chosen() == self.usual).all(dim=1)
            return not bool((self.work.moved() & same).any())


def _shifted(table: Tensor, experts: int) -> Tensor:
    """What makes every id of a table another one."""
    return torch.where(table + 1 < experts, 1, -table).to(table.dtype)
