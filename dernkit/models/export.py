"""How a result whose layers keep different numbers of experts is written: padded to one number, or for dernkit only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dernkit.api import Block
from dernkit.errors import RecipeError


@dataclass(frozen=True, slots=True)
class Export:
    """The numbers of experts of a result, and what it takes to load it."""

    kind: str
    """``even`` (one count in every layer), ``padded`` (to the largest) or ``dernkit`` (different counts)."""
    counts: tuple[int, ...]
    """Real experts in every MoE layer."""

    @property
    def most(self) -> int:
        """What config.json says."""
        return max(self.counts)

    @property
    def written(self) -> tuple[int, ...]:
        """Experts in every MoE layer of the files, padding included."""
        return (self.most,) * len(self.counts) if self.kind == "padded" else self.counts

    @property
    def spread(self) -> str:
        """The counts in words: ``4``, or ``3 to 6``."""
        least = min(self.counts)
        return str(least) if least == self.most else f"{least} to {self.most}"

    def sentence(self, padding: str = "") -> str:
        """The first line of reports and cards; ``padding``: what it costs."""
        if self.kind == "even":
            return f"Loads in any runtime: one count ({self.most}) in every layer."
        if self.kind == "padded":
            return (
                f"Loads in any runtime: {self.spread} experts a layer, padded to {self.most} with experts that are "
                f"never chosen{padding}."
            )
        return f"Loads with `dernkit.load_model` only: {self.spread} experts a layer."


def export_of(blocks: Sequence[Block], counts: Sequence[int], wanted: str) -> Export:
    """How to write layers with these counts.

    Args:
        wanted: ``padded``, ``dernkit``, or ``auto``: padded where the router allows it.

    Raises:
        RecipeError: they are to be padded and cannot be.
    """
    kind = "even"
    if len(set(counts)) > 1:
        kind = "dernkit"
        if wanted == "padded" or (wanted == "auto" and all(block.padding() for block in blocks)):
            kind = "padded"
        check_export(blocks, kind)
    return Export(kind, tuple(counts))


def check_export(blocks: Sequence[Block], wanted: str) -> None:
    """Refuse what the model does not allow, before anything expensive starts.

    Raises:
        RecipeError: its routers cannot be padded, or its layers cannot have counts of their own.
    """
    for block in blocks:
        if wanted == "dernkit" and not block.uneven():
            raise RecipeError(
                f"apply.export: 'dernkit' needs layers that can have a number of experts of their own. Got "
                f"'{block.path}', which looks into the config while it runs, instead. Use the budget 'uniform'."
            )
        if wanted == "padded" and not block.padding():
            raise RecipeError(
                f"apply.export: 'padded' needs routers with a bias that can keep an expert from ever being chosen. "
                f"Got none in '{block.path}' instead. Use 'dernkit', whose results load with dernkit.load_model only, "
                f"or the budget 'uniform'."
            )
