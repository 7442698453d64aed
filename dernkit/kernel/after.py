"""A layer as surgery leaves it, as a bank of its own: kept experts under new numbers, and the router on new rows."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.types import CompressedLayer, ExpertBank, Route, Routing


def after_surgery(compressed: CompressedLayer, bank: ExpertBank, kept: Int64[Tensor, " kept"]) -> ExpertBank:
    """The kept experts, numbered by their position, with the model's router on its new rows.

    Args:
        compressed: what became of the layer.
        bank: the layer as it was.
        kept: source indices of the kept experts, ascending.
    """
    count, width = compressed.up.shape[:2]
    return replace(
        bank,
        dims=replace(bank.dims, experts=count, width=width),
        gate=compressed.gate,
        up=compressed.up,
        down=compressed.down,
        gate_bias=compressed.gate_bias,
        up_bias=compressed.up_bias,
        down_bias=compressed.down_bias,
        router=compressed.router,
        per_expert=compressed.per_expert,
        route=None if bank.route is None else _route(bank.route, kept, new_rows(compressed, bank), bank.dims.experts),
    )


def new_rows(compressed: CompressedLayer, bank: ExpertBank) -> Float[Tensor, "kept row"]:
    """The router's rows as a `Route` takes them."""
    if bank.router_bias is None:
        return compressed.router
    parts = (compressed.router, compressed.per_expert[bank.router_bias][:, None])
    return torch.cat([part.to(torch.float32) for part in parts], dim=1)


def _route(route: Route, kept: Int64[Tensor, " kept"], new: Float[Tensor, "kept row"], count: int) -> Route:
    """Chosen experts by their position among the kept; identity experts follow them."""

    def routed(inputs: Tensor, experts: Tensor | None = None, rows: Tensor | None = None) -> Routing:
        there = kept.to(new.device)
        some = torch.arange(len(kept), device=new.device) if experts is None else experts
        found = route(inputs, there[some], new[some] if rows is None else rows)
        most = max(int(found.chosen.max()) + 1 if found.chosen.numel() else 0, count)
        places = torch.arange(most, device=new.device) - count + len(kept)
        places[:count] = len(kept)  # unused choices, which count for nothing
        places[there] = torch.arange(len(kept), device=new.device)
        return replace(found, chosen=places[found.chosen], logits=found.logits[:, there])

    return routed
