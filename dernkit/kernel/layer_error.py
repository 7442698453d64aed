"""How far a compressed layer's output is from the original's on sampled inputs, without a forward pass of the model."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from dernkit.errors import CheckpointError
from dernkit.kernel.after import after_surgery, new_rows
from dernkit.kernel.outputs import layer_output
from dernkit.types import CompressedLayer, ExpertBank, LayerStats, Route, Routing

_CHUNK = 2**24
"""Float32 numbers of an output that are held at once (64 MiB)."""


@torch.no_grad()
def layer_error(
    bank: ExpertBank,
    compressed: CompressedLayer,
    kept: Int64[Tensor, " kept"],
    stats: LayerStats,
    before: Route | None = None,
) -> float | None:
    """``Σ_t ‖Y'(x_t) − Y(x_t)‖² / Σ_t ‖Y(x_t)‖²``, the routed experts' sum after surgery against that before.

    Both are routed by the model's own router: Y among all experts, Y' among the kept ones by their new rows. Shared and
    identity experts are left out of both. Exactly 0 where nothing has changed. What earlier layers do to the inputs is
    not in it: these are the original's.

    Args:
        bank: the layer as it was.
        compressed: what `compress_layer` made of it.
        kept: the experts that are left, by their index in ``bank``.
        stats: of the layer, with a `sample`.
        before: the original's router, where ``bank.route`` is that of groups which become one (`Block.route`).

    Returns:
        None where nothing was sampled, where tokens cannot be routed again (a table of token ids chooses, or the router
        reads more than the hidden states), or where the routed experts give only zeros.

    Raises:
        CheckpointError: outputs are not finite.
    """
    if bank.route is None or bank.tables or "sample" not in stats.values or not stats.router_inputs.numel():
        return None
    after, rows = after_surgery(compressed, bank, kept), new_rows(compressed, bank)
    stats, kept = stats.to(bank.up.device), kept.to(bank.up.device)
    changed = _changed(compressed, bank, kept).to(kept.device)
    step = max(1, _CHUNK // bank.down.shape[1])
    error = energy = 0.0
    for inputs, seen in zip(stats["sample"].split(step), stats.router_inputs.split(step), strict=True):
        whole = layer_output(bank, inputs, (before or bank.route)(seen))
        routing = bank.route(seen, kept, rows)
        found = layer_output(bank, inputs, _only(routing, kept[~changed], kept[~changed], bank.dims.experts))
        found += layer_output(after, inputs, _only(routing, kept[changed], changed.nonzero().flatten(), len(kept)))
        error += float((found - whole).square().sum(dtype=torch.float64))
        energy += float(whole.square().sum(dtype=torch.float64))
    if not math.isfinite(error + energy):
        raise CheckpointError(
            f"layer {bank.dims.layer}: what the experts make of the sampled inputs must be finite, before and after "
            "surgery. Got NaN or infinity instead. Check the download of the checkpoint, or repair it."
        )
    return error / energy if energy > 0 else None


def _changed(compressed: CompressedLayer, bank: ExpertBank, kept: Int64[Tensor, " kept"]) -> Bool[Tensor, " kept"]:
    """Which experts are other ones now. What is left of the others is computed as it was before, to the same bits."""
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    parts = [(getattr(compressed, name), getattr(bank, name)) for name in names]
    return torch.tensor(
        [
            any(new is not None and not torch.equal(new[position], old[expert]) for new, old in parts)
            for position, expert in enumerate(kept.tolist())
        ]
    )


def _only(routing: Routing, experts: Int64[Tensor, " some"], numbers: Int64[Tensor, " some"], none: int) -> Routing:
    """Choices of some experts only, under other numbers; all others become ``none``, which is no expert's."""
    most = int(torch.cat([routing.chosen.flatten(), experts]).max()) + 1
    places = torch.full((most,), none, dtype=torch.int64, device=experts.device)
    places[experts] = numbers
    return replace(routing, chosen=places[routing.chosen])
