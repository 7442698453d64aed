"""What the blocks of one model share: the config fields that set expert count and width, and what follows them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dernkit.models.coupling import Coupling, couple
from dernkit.models.layouts import Layout
from dernkit.models.probe import Field, Probe, probe_field


def layout_of(module: nn.Module, layouts: Sequence[Layout]) -> Layout | None:
    """The first layout that claims the module."""
    return next((layout for layout in layouts if layout.claims(module)), None)


@dataclass(slots=True)
class Family:
    """The probes of one model; that of the width runs when it is first asked for."""

    model: Any
    layouts: Sequence[Layout]
    paths: list[str]
    """Of the experts modules."""
    count: Probe
    experts: int
    width: int
    rehearsals: dict[Any, Any] = field(default_factory=dict)
    """What was seen of one block of each kind; see `dernkit.models.rehearsal`."""
    _coupling: Coupling | None = None

    @staticmethod
    def of(model: Any, layouts: Sequence[Layout], paths: list[str], experts: int, width: int) -> Family:
        """Find the field that counts experts.

        Raises:
            CheckpointError: none, or more than one, does.
        """
        count = probe_field(model, experts, lambda a, b: _grown(a, b, layouts, paths, 0), "expert count")
        return Family(model, layouts, paths, count, experts, width)

    def coupling(self) -> Coupling:
        """The field that sets the width, and all that follows it outside the experts."""
        if self._coupling is None:
            probe = probe_field(
                self.model, self.width, lambda a, b: _grown(a, b, self.layouts, self.paths, 1), "expert width"
            )
            self._coupling = couple(self.model, probe, self.paths)
        return self._coupling

    def coupled(self, block: str) -> list[str]:
        """Paths of the coupled MLPs that the surgery on one block takes along: those inside it, and each dense layer's
        by one of the blocks, so that no two do it and few are in memory at a time.
        """
        blocks = [path.rpartition(".")[0] for path in self.paths]
        return [path for path in self.coupling().modules if _caretaker(path, blocks) == block]

    def fields(self, experts: int, width: int) -> dict[Field, int]:
        """Config field -> value for a new expert count and width."""
        fields = {self.count.field: experts}
        return fields if width == self.width else fields | self.coupling().fields(width)


def _caretaker(path: str, blocks: list[str]) -> str:
    inside = [block for block in blocks if path.startswith(block + ".")]
    later = [block for block in blocks if layer_number(block) >= layer_number(path)]
    return (inside or later or blocks[-1:])[0]


def layer_number(path: str) -> int:
    """The first number in a module's path; -1 without one."""
    number = re.search(r"\.(\d+)(\.|$)", "." + path)
    return -1 if number is None else int(number.group(1))


def _grown(model: Any, other: Any, layouts: Sequence[Layout], paths: list[str], dim: int) -> bool:
    """Whether every experts module of ``other`` has more experts (dim 0) or wider ones (dim 1), and else the same."""
    for path in paths:
        before, after = (_sizes(m.get_submodule(path), layouts) for m in (model, other))
        if after is None or before is None or after[dim] <= before[dim] or after[1 - dim] != before[1 - dim]:
            return False
    return True


def _sizes(module: Any, layouts: Sequence[Layout]) -> tuple[int, int] | None:
    """Experts and width; None where the weights do not fit the module's own sizes."""
    layout = layout_of(module, layouts)
    if layout is None:
        return None
    up = layout.unpack(module).up
    return up.shape[0], up.shape[1]
