"""What the blocks of one model share: the config fields that set expert count and width, and what follows them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dernkit.models.coupling import Coupling, couple
from dernkit.models.layout import Layout
from dernkit.models.probe import Field, Probe, probe_field


def layout_of(module: nn.Module, layouts: Sequence[Layout]) -> Layout | None:
    """The first layout that claims the module."""
    return next((layout for layout in layouts if layout.claims(module)), None)


@dataclass(slots=True)
class Family:
    """The probes of one model; that of the width runs when it is first asked for."""

    model: Any
    layouts: Mapping[str, Layout]
    """Path of an experts module -> its layout."""
    count: Probe
    experts: int
    width: int
    rehearsals: dict[Any, Any] = field(default_factory=dict)
    """What was seen of one block of each kind; see `dernkit.models.rehearsal`."""
    paddings: dict[Any, str | None] = field(default_factory=dict)
    """What keeps experts of a block of each kind from being chosen; see `dernkit.models.padding`."""
    uneven: dict[Any, bool] = field(default_factory=dict)
    """Whether a block of each kind works with a count that is not the config's."""
    _coupling: Coupling | None = None

    @staticmethod
    def of(model: Any, layouts: Mapping[str, Layout], experts: int, width: int) -> Family:
        """Find the field that counts experts.

        Raises:
            CheckpointError: none, or more than one, does.
        """
        lists = [holder(path, layout) for path, layout in layouts.items() if layout.expert_modules is not None]
        count = probe_field(model, experts, lambda a, b: _grown(a, b, layouts, 0), "expert count", lists)
        return Family(model, layouts, count, experts, width)

    def coupling(self) -> Coupling:
        """The field that sets the width, and all that follows it outside the experts."""
        if self._coupling is None:
            probe = probe_field(self.model, self.width, lambda a, b: _grown(a, b, self.layouts, 1), "expert width")
            self._coupling = couple(self.model, probe, [holder(*place) for place in self.layouts.items()])
        return self._coupling

    def block(self, experts: str) -> str:
        """Path of the MoE block around an experts module: the module itself, if something else there follows the count,
        or else its parent.
        """
        inside = holder(experts, self.layouts[experts]) + "."
        own = any(name.startswith(experts + ".") and not name.startswith(inside) for name in self.count.tensors)
        return experts if own else experts.rpartition(".")[0]

    def coupled(self, block: str) -> list[str]:
        """Paths of the coupled MLPs that the surgery on one block takes along: those inside it, and each dense layer's
        by one of the blocks, so that no two do it and few are in memory at a time.
        """
        blocks = [self.block(path) for path in self.layouts]
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


def holder(path: str, layout: Layout) -> str:
    """Path of what holds the experts' weights and nothing else: the experts module, or the list of experts in it."""
    return f"{path}.{layout.expert_modules}" if layout.expert_modules else path


def _grown(model: Any, other: Any, layouts: Mapping[str, Layout], dim: int) -> bool:
    """Whether every experts module of ``other`` has more experts (dim 0) or wider ones (dim 1), and else the same."""
    twins = dict(other.named_modules())
    for path, layout in layouts.items():
        if path not in twins or not layout.claims(twins[path]):
            return False
        before, after = (layout.unpack(module).up.shape for module in (model.get_submodule(path), twins[path]))
        if after[dim] <= before[dim] or after[1 - dim] != before[1 - dim]:
            return False
        names, more = (list(layout.members(module)) for module in (model.get_submodule(path), twins[path]))
        if more[: len(names)] != names:
            return False
    return True
