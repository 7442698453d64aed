"""How a refitted layer does on the text that it was fitted to and on other text, and how much there was of it."""

from __future__ import annotations

from dataclasses import dataclass

from dernkit.kernel.after import after_surgery
from dernkit.kernel.function_space import turns
from dernkit.kernel.layer_error import layer_error
from dernkit.types import CompressedLayer, ExpertBank, LayerPlan, LayerStats


@dataclass(frozen=True, slots=True)
class Fit:
    """Of one layer."""

    inside: float | None
    """`layer_error` on the samples that components saw; None: cannot be told."""
    outside: float | None
    """The same on samples that none saw; None: nothing was held out."""
    fewest: int
    """Sampled tokens that components saw of the kept expert that gets the fewest."""
    width: int
    """Neurons of an expert, each of whose down columns is found from these tokens."""


def judge(bank: ExpertBank, compressed: CompressedLayer, plan: LayerPlan, stats: LayerStats) -> Fit:
    """Hold a refitted layer against the original's output.

    Raises:
        CheckpointError: outputs are not finite.
    """
    stats = stats.to(bank.up.device)
    seen, after = stats.only(frozenset({"sample"})), after_surgery(compressed, bank, plan.kept)
    count, width = compressed.up.shape[:2]
    fewest = 0
    if after.route is not None and seen.router_inputs.numel():
        tokens = {expert: len(rows) for expert, rows, _ in turns(after.route(seen.router_inputs), range(count))}
        fewest = min(tokens.get(expert, 0) for expert in range(count))
    return Fit(
        inside=layer_error(bank, compressed, plan.kept, seen),
        outside=layer_error(bank, compressed, plan.kept, stats.judges()) if stats.held_out else None,
        fewest=fewest,
        width=width,
    )
