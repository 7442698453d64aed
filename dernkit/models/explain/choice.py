"""What decides which experts a token uses: the router's matrix, biases, scales and tables of expert ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dernkit.models.explain.experiment import Experiment, Slot, _spread, changed
from dernkit.models.explain.experts import Experts, Member

_SAMPLED = 4


@dataclass
class Choice:
    """What was found about the routing."""

    routers: list[tuple[str, int, int]] = field(default_factory=list)
    """(matrix, the dimension that counts experts, its length)."""
    choice_biases: list[str] = field(default_factory=list)
    logit_biases: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    upstream: list[str] = field(default_factory=list)
    """What influences the choice without having an entry for each expert."""


def find_choice(work: Experiment, experts: Experts, down: Member) -> Choice:
    """Change everything but the experts, and see which tokens choose other experts then."""
    return _Search(work, experts, down).found


class _Search:
    def __init__(self, work: Experiment, experts: Experts, down: Member) -> None:
        self.work, self.experts, self.down = work, experts, down
        self.found = Choice()
        self.usual = self.chosen()
        mine = {member.name for member in experts.members if len(member.shape) == 2}
        for slot in work.slots:
            if slot.name not in mine:
                self._try(slot)

    def chosen(self) -> Tensor:
        """bool [tokens, experts]: a token uses an expert if its output changes with the expert's down projection."""
        with torch.no_grad():
            before = self.work.run()
        columns = []
        for expert in range(self.experts.count):
            pieces = self.down.pieces(expert)
            with changed(pieces, [_spread(piece.shape) * self.work.noise(piece.shape) for piece in pieces]):
                columns.append(self.work.differs(before))
        return torch.stack(columns, dim=1)

    def _try(self, slot: Slot) -> None:
        if not slot.parts[0].is_floating_point():
            if slot.parts[0].numel() > 1 and self._changes(slot.parts, [_shifted(part, self.experts.count) for part in slot.parts]):
                self.found.tables.append(slot.name)
            return
        if not self._changes(slot.parts, [self._shock(part) for part in slot.parts]):
            return
        dims = [dim for dim, length in enumerate(slot.shape) if length >= self.experts.count and self._one_each(slot, dim)]
        if len(dims) != 1:
            self.found.upstream.append(slot.name)
            return
        rest = [length for dim, length in enumerate(slot.shape) if dim != dims[0] and length > 1]
        if len(rest) == 1:
            self.found.routers.append((slot.name, dims[0], slot.shape[dims[0]]))
        elif rest:
            self.found.upstream.append(slot.name)
        elif self._only_choice(slot):
            self.found.choice_biases.append(slot.name)
        else:
            self.found.logit_biases.append(slot.name)

    def _shock(self, tensor: Tensor) -> Tensor:
        return 5 * _spread(tensor.shape) * self.work.noise(tensor.shape)

    def _changes(self, pieces: Sequence[Tensor], deltas: Sequence[Tensor]) -> bool:
        with changed([piece.data for piece in pieces], deltas):
            return bool((self.chosen() != self.usual).any())

    def _one_each(self, slot: Slot, dim: int) -> bool:
        """Whether changing entry i along the dimension lets tokens take up or give up expert i."""
        hits = misses = 0
        for index in torch.linspace(0, self.experts.count - 1, _SAMPLED).round().long().unique().tolist():
            pieces = slot.pieces(dim, index)
            for sign in (1, -1):
                deltas = [sign * (self._shock(piece) if piece.numel() > 1 else torch.full_like(piece, 5.0)) for piece in pieces]
                with changed(pieces, deltas):
                    other = self.chosen() != self.usual
                hits += int(other[:, index].sum())
                misses += int((other.any(dim=1) & ~other[:, index]).sum())
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
