"""Arithmetic for one layer: run a merge and a router on a plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.api import BiasMerge, Merge, Refit, Router
from dernkit.errors import CheckpointError, RecipeError
from dernkit.kernel import calls
from dernkit.kernel.after import after_surgery
from dernkit.kernel.contracts import Call
from dernkit.kernel.seeding import generator
from dernkit.kernel.segments import ExpertTensors, finite_segments, split
from dernkit.kernel.symmetry import rescaled
from dernkit.kernel.tables import remap
from dernkit.types import CompressedLayer, ExpertBank, LayerPlan, LayerStats, Pool

NO_STATISTICS = LayerStats(tokens=0)


def target_width(
    plans: Sequence[LayerPlan], merge: Merge | None, asked: int | None = None, *, multiple: int = 64
) -> int:
    """Neurons of every expert after surgery.

    Args:
        plans: of all layers.
        merge: how arrivals are merged.
        asked: the width that the recipe wants. None: the width as it is, or for a merge that widens, the largest pool
            of all layers, rounded up to ``multiple``; where nothing moves in any layer the width stays, odd or not.
            Where kept experts leave so much behind that all pools are smaller, the largest one, rounded up to 8.
    """
    width = max(plan.width for plan in plans)
    if asked is not None:
        return asked
    if merge is not None and (most := max(max(plan.pool_sizes()) for plan in plans)) < width:
        return min(width, -(-most // 8) * 8)
    if merge is None or not merge.widens or not any(len(plan.assignment) for plan in plans):
        return width
    largest = max(max(plan.pool_sizes()) for plan in plans)
    return -(-largest // multiple) * multiple


def check_width(asked: int, width: int, dtype: torch.dtype) -> None:
    """Rows of experts must be multiples of 16 bytes, as torch's grouped matrix product needs.

    Raises:
        RecipeError: ``asked`` makes other ones. The ``width`` that the model has may stay, odd or not.
    """
    step = max(16 // dtype.itemsize, 1)
    if asked % step and asked != width:
        below = f"{asked // step * step} or " if asked > step else ""
        raise RecipeError(
            f"apply.width: must be a multiple of {step}, which kernels for this dtype need. Got {asked} instead. "
            f"Use {below}{(asked // step + 1) * step}."
        )


def compress_layer(
    bank: ExpertBank,
    plan: LayerPlan,
    merge: Merge | None,
    router: Router,
    width: int,
    rng_seed: int,
    stats: LayerStats = NO_STATISTICS,
    refit: Refit | None = None,
) -> CompressedLayer:
    """Carry out ``plan`` on ``bank``: K experts of ``width`` neurons, in the checkpoint's dtype.

    An expert that receives nothing keeps its bits (padded with zero neurons if it is to be wider), unless down
    projections are refitted. One expert's pool at a time is in float32; the random numbers of an expert depend on seed,
    layer and source index only.
    """
    _check_plan(bank, plan)
    kept, stats = plan.kept.to(bank.up.device), stats.to(bank.up.device)
    rows, biases = _router_rows(bank, plan, router, stats)
    out = CompressedLayer(
        layer=plan.layer,
        gate=None if bank.gate is None else _blank(bank.gate, len(kept), width, dim=1),
        up=_blank(bank.up, len(kept), width, dim=1),
        down=_blank(bank.down, len(kept), width, dim=2),
        gate_bias=None if bank.gate_bias is None else _blank(bank.gate_bias, len(kept), width, dim=1),
        up_bias=None if bank.up_bias is None else _blank(bank.up_bias, len(kept), width, dim=1),
        down_bias=None if bank.down_bias is None else bank.down_bias[kept],
        router=rows,
        per_expert={name: _slice(name, tensor, bank, kept) for name, tensor in bank.per_expert.items()}
        | biases
        | {name: remap(table, plan) for name, table in bank.tables.items()},
    )
    for position, expert in enumerate(plan.kept.tolist()):
        arrivals = (plan.assignment.target == position).nonzero().flatten()
        whole = len(plan.stays(expert)) == plan.width
        if len(arrivals) == 0 and whole and width >= plan.width:
            tensors = _untouched(bank, expert)
        else:
            merge = _needed(merge, f"layer {plan.layer}, expert {expert}")
            pool = _pool(bank, plan, expert, arrivals, Call("merge", merge, plan.layer).seen(stats))
            rng = generator(rng_seed, plan.layer, expert)
            tensors = split(calls.merge(merge, pool, width, rng, plan.layer), bank)
            if out.down_bias is not None and len(arrivals) and isinstance(merge, BiasMerge):
                out.down_bias[position] = calls.merge_bias(merge, pool, plan.layer)
        _put(tensors, out, position)
    if refit is not None and (plan.changes_experts or width < plan.width):
        after = after_surgery(out, bank, kept)
        out.down.copy_(calls.refit(refit, bank, after, plan, Call("refit", refit, plan.layer).seen(stats)))
    return out


def _check_plan(bank: ExpertBank, plan: LayerPlan) -> None:
    dims = bank.dims
    if (plan.layer, plan.experts, plan.width) != (dims.layer, dims.experts, dims.width):
        raise CheckpointError(
            f"layer {dims.layer}: the plan must be made for this model, {dims.experts} experts of {dims.width} "
            f"neurons. Got a plan for layer {plan.layer}, {plan.experts} experts of {plan.width} instead. "
            "Plan again with this model."
        )


def _blank(tensor: Tensor, kept: int, width: int, *, dim: int) -> Tensor:
    shape = [kept, *tensor.shape[1:]]
    shape[dim] = width
    return tensor.new_zeros(shape)


def _untouched(bank: ExpertBank, expert: int) -> ExpertTensors:
    """Views in the checkpoint's dtype."""
    return ExpertTensors(
        gate=None if bank.gate is None else bank.gate[expert],
        up=bank.up[expert],
        down=bank.down[expert],
        gate_bias=None if bank.gate_bias is None else bank.gate_bias[expert],
        up_bias=None if bank.up_bias is None else bank.up_bias[expert],
    )


def _put(expert: ExpertTensors, out: CompressedLayer, position: int) -> None:
    """Write one expert into its place, cast to the dtype there; neurons that it lacks stay zero."""
    neurons = len(expert.up)
    rows = [(out.gate, expert.gate), (out.up, expert.up)]
    rows += [(out.gate_bias, expert.gate_bias), (out.up_bias, expert.up_bias)]
    for place, value in rows:
        if place is not None and value is not None:
            place[position, :neurons] = value
    out.down[position, :, :neurons] = expert.down


def _pool(bank: ExpertBank, plan: LayerPlan, expert: int, arrivals: Int64[Tensor, " moves"], stats: LayerStats) -> Pool:
    """Segments weigh the score of the expert they come from; all the same if all those scores are 0 or less."""
    own, stays = finite_segments(bank, expert), plan.stays(expert)
    source = plan.assignment.source[arrivals]
    owner, neuron = (source // plan.width).to(own.device), (source % plan.width).to(own.device)
    incoming = own.new_empty(len(arrivals), *own.shape[1:])
    for donor in owner.unique().tolist():
        incoming[owner == donor] = finite_segments(bank, donor)[neuron[owner == donor]]
    if plan.assignment.scale is not None:
        incoming = rescaled(incoming, plan.assignment.scale[arrivals].to(incoming))
    weights = plan.scores.clamp(min=0).to(own.device, torch.float32)
    if not bool(weights[expert] + weights[owner].sum()):
        weights = torch.ones_like(weights)
    place = torch.zeros(plan.width, dtype=torch.int64)
    place[stays] = torch.arange(len(stays))
    return Pool(
        own=own if len(stays) == plan.width else own[stays.to(own.device)],
        own_weight=float(weights[expert]),
        incoming=incoming,
        incoming_weight=weights[owner],
        partner=place[plan.assignment.partner[arrivals]].to(own.device),
        affinity=plan.assignment.affinity[arrivals].to(own.device),
        expert=expert,
        incoming_expert=owner,
        act=bank.act,
        stats=stats,
        down_bias=bank.down_bias,
    )


def _needed(merge: Merge | None, where: str) -> Merge:
    if merge is None:
        raise RecipeError(
            f"apply.merge, {where}: must be given for a plan that moves segments or narrows experts. Got none instead. "
            "Name one, or leave `assign` out of the plan to prune only."
        )
    return merge


def _router_rows(
    bank: ExpertBank, plan: LayerPlan, router: Router, stats: LayerStats
) -> tuple[Float[Tensor, "kept router_hidden"], dict[str, Tensor]]:
    """New rows, and the logits' bias by its name, in the checkpoint's dtype.

    What has the same float32 values keeps its bits.
    """
    bias = None if bank.router_bias is None else bank.per_expert[bank.router_bias]
    before = bank.router if bias is None else torch.cat([bank.router, bias[:, None].to(bank.router)], dim=1)
    told = replace(plan, biased_rows=bias is not None)
    rows = calls.update(router, before.to(torch.float32, copy=True), told, _with_features(bank, router, stats))
    kept = plan.kept.to(bank.router.device)
    rows = rows.to(bank.router.device)
    new = _unless_same(rows[:, : bank.router.shape[1]], bank.router[kept])
    if bias is None:
        return new, {}
    return new, {str(bank.router_bias): _unless_same(rows[:, -1:], bias[kept, None])[:, 0]}


def _with_features(bank: ExpertBank, router: Router, stats: LayerStats) -> LayerStats:
    """A router's inputs are what its rows are multiplied with: some families normalise or project them first."""
    if "sample" not in router.requires:
        return stats
    inputs = Call("router", router, bank.dims.layer).seen(stats).router_inputs
    features = None if bank.route is None else bank.route(inputs, None).features
    if features is None:
        raise CheckpointError(
            f"router '{router.name}', layer {bank.dims.layer}: the adapter must tell what the router's rows are "
            "multiplied with for them to be fitted. Got none instead. Use the router 'additive' or 'average'."
        )
    return replace(stats, values={**stats.values, "router_sample": features})


def _unless_same(rows: Tensor, old: Tensor) -> Tensor:
    unchanged = (rows == old.to(torch.float32)).all(1, keepdim=True)
    return torch.where(unchanged, old, rows.to(old.dtype))


def _slice(name: str, tensor: Tensor, bank: ExpertBank, kept: Int64[Tensor, " kept"]) -> Tensor:
    """The kept entries along the dimension that has E of them; the last such dimension if there are several."""
    dims = [dim for dim, size in enumerate(tensor.shape) if size == bank.dims.experts]
    if not dims:
        raise CheckpointError(
            f"layer {bank.dims.layer}, {name}: must have a dimension of {bank.dims.experts} experts. "
            f"Got shape {list(tensor.shape)} instead. Fix the adapter, or leave this tensor out of `per_expert`."
        )
    return tensor.index_select(dims[-1], kept.to(tensor.device))
