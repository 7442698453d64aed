"""What results say of a model's layers: what a plan did to each, and how alike the neurons of its experts are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float32
from torch import Tensor

from dernkit.api import Block
from dernkit.compare.rows import LayerFacts
from dernkit.kernel.layer_error import layer_error
from dernkit.kernel.seeding import generator
from dernkit.types import CompressedLayer, ExpertBank, LayerPlan, LayerStats

NEURONS = 128
"""Of each expert, at most so many are looked at for the similarity between experts."""
_BINS = 50


def layer_facts(block: Block, plan: LayerPlan, compressed: CompressedLayer, stats: LayerStats) -> LayerFacts:
    """Of a layer that is about to be put in its place; ``block`` is as it was."""
    moves = plan.assignment
    deciles = np.quantile(moves.affinity.double().numpy(), np.linspace(0, 1, 11)) if len(moves) else np.empty(0)
    return LayerFacts(
        layer=plan.layer,
        experts=plan.experts,
        kept=tuple(plan.kept.tolist()),
        scores=tuple(plan.scores.tolist()),
        used=used(stats),
        moved=tuple(torch.bincount(moves.target, minlength=len(plan.kept)).tolist()),
        affinity=tuple(deciles.tolist()),
        error=layer_error(block.bank(), compressed, plan.kept, stats, block.route()),
    )


def used(stats: LayerStats) -> tuple[float, ...]:
    """Share of the tokens that each expert gets; empty where it was not counted."""
    return tuple((stats["routed"] / stats.tokens).tolist()) if "routed" in stats.values else ()


def moved_share(plans: Sequence[LayerPlan]) -> float:
    """Different segments that moved, per segment of a dropped expert; 0 where none was dropped."""
    dropped = sum(len(plan.dropped) * plan.width for plan in plans)
    return sum(len(plan.assignment.source.unique()) for plan in plans) / dropped if dropped else 0.0


def similarity(blocks: Sequence[Block]) -> dict[str, Any]:
    """How alike the experts of each layer are, as figure 1 of DERN (arXiv 2509.10377) looks at it.

    Returns:
        ``similarity``: by layer, E × E: the mean over neurons of expert i (at most 128 of them) of the best cosine of
        (up, down) with a neuron of expert j. ``cosines``: ``edges`` of bins from −1 to 1 and, by layer, ``counts`` of
        those neurons by their best cosine with a neuron of any other expert.
    """
    edges = np.linspace(-1, 1, _BINS + 1)
    matrices: dict[str, list[list[float]]] = {}
    counts: dict[str, list[int]] = {}
    for block in blocks:
        best = _best_cosines(block.bank()).cpu()
        matrices[str(block.layer)] = best.double().mean(2).tolist()
        others = best.masked_fill(torch.eye(len(best), dtype=torch.bool)[:, :, None], -1.0).amax(1)
        found, _ = np.histogram(others.clamp(-1, 1).numpy(), edges)
        counts[str(block.layer)] = found.tolist()
    return {"similarity": matrices, "cosines": {"edges": edges.tolist(), "counts": counts}}


def _best_cosines(bank: ExpertBank) -> Float32[Tensor, "experts experts neurons"]:
    """[i, j, n]: the best cosine of neuron n of expert i with any of expert j."""
    dims = bank.dims
    width = bank.up.shape[1]
    chosen = torch.randperm(width, generator=generator(0, dims.layer))[:NEURONS].sort().values
    queries = torch.cat([_vectors(bank, expert)[chosen] for expert in range(dims.experts)])
    best = [(queries @ _vectors(bank, expert).T).amax(1) for expert in range(dims.experts)]
    return torch.stack(best).view(dims.experts, dims.experts, len(chosen)).transpose(0, 1)


def _vectors(bank: ExpertBank, expert: int) -> Float32[Tensor, "width both"]:
    """Unit vectors of (up row, down column); of a dead neuron: 0."""
    return torch.nn.functional.normalize(bank.segments(expert)[:, -2:].flatten(1), dim=1)


def live_sizes(model: Any, expert_tensors: frozenset[str]) -> tuple[int, int, int]:
    """Parameters, bytes, and bytes of routed experts of a model in memory, tied tensors counted once."""
    tensors: Mapping[str, Tensor] = model.state_dict()
    once = {(tensor.data_ptr(), tensor.shape): tensor for tensor in tensors.values()}
    experts = sum(tensor.nbytes for name, tensor in tensors.items() if name in expert_tensors)
    return sum(t.numel() for t in once.values()), sum(t.nbytes for t in once.values()), experts
