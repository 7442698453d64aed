"""Small random expert banks and statistics, for tests of plugins and of dernkit itself."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.types import CompressedLayer, ExpertBank, LayerDims, LayerStats, Pool, Retention, Route, Routing


def random_bank(
    experts: int = 4,
    width: int = 8,
    hidden: int = 6,
    *,
    gated: bool = True,
    bias: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    top_k: int = 2,
    groups: int = 1,
    layer: int = 0,
) -> ExpertBank:
    """Gaussian experts with SiLU, plus a correction bias in ``per_expert``; biases everywhere or nowhere."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng).to(dtype)

    router = normal(experts, hidden)
    return ExpertBank(
        dims=LayerDims(layer, experts, top_k, width, hidden, groups),
        gate=normal(experts, width, hidden) if gated else None,
        up=normal(experts, width, hidden),
        down=normal(experts, hidden, width),
        gate_bias=normal(experts, width) if gated and bias else None,
        up_bias=normal(experts, width) if bias else None,
        down_bias=normal(experts, hidden) if bias else None,
        router=router,
        per_expert={"correction_bias": normal(experts)},
        act=_silu,
        route=softmax_route(router, top_k),
    )


def softmax_route(router: Float[Tensor, "experts hidden"], top_k: int) -> Route:
    """Softmax over the top-k logits, as in Mixtral; of a tie the lowest index."""

    def route(inputs: Tensor, experts: Tensor | None = None, rows: Tensor | None = None) -> Routing:
        used = router.to(inputs.device, torch.float32)
        if rows is not None:
            places = torch.arange(len(router)) if experts is None else experts
            used = used.index_copy(0, places.to(used.device), rows.to(used))
        logits = inputs.to(torch.float32) @ used.T
        if experts is not None:
            masked = torch.full_like(logits, -torch.inf)
            masked[:, experts] = logits[:, experts]
            logits = masked
        chosen = torch.argsort(logits, dim=1, descending=True, stable=True)[:, :top_k]
        return Routing(chosen, logits.gather(1, chosen).softmax(dim=1), logits, inputs)

    return route


def _silu(gate: Float[Tensor, "n width"] | None, up: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    return torch.nn.functional.silu(up) if gate is None else torch.nn.functional.silu(gate) * up


def random_stats(bank: ExpertBank, *, tokens: int = 100, seed: int = 0, sample: int = 16) -> LayerStats:
    """All statistics with plausible values: at most ``tokens`` tokens an expert, coefficients in (0, 1)."""
    rng = torch.Generator().manual_seed(seed)
    experts, hidden = bank.dims.experts, bank.dims.hidden
    routed = torch.randint(1, tokens + 1, (experts,), generator=rng).to(torch.float64)
    gate_sum, norm = (torch.rand(2, experts, generator=rng, dtype=torch.float64) * routed).unbind()
    return LayerStats(
        tokens,
        {
            "routed": routed,
            "gate_sum": gate_sum,
            "output_norm_sum": norm,
            "output_sq_sum": norm**2 / routed,
            "reap_sum": gate_sum * norm / routed,
            "output_sum": torch.randn(experts, hidden, generator=rng, dtype=torch.float64),
            "sample": torch.randn(sample, hidden, generator=rng),
            "sample_key": torch.rand(sample, generator=rng, dtype=torch.float64).sort().values,
            "sample_token": torch.randperm(max(tokens, sample), generator=rng)[:sample],
        },
        sample_size=sample,
    )


def retained(bank: ExpertBank, kept: list[int], group: list[int] | None = None) -> Retention:
    """These experts stay; scores fall with the index."""
    scores = torch.arange(bank.dims.experts, 0, -1, dtype=torch.float64)
    return Retention(scores, torch.tensor(kept), None if group is None else torch.tensor(group))


def random_pool(
    own: int = 8,
    arrivals: int = 7,
    parts: int = 3,
    features: int = 6,
    *,
    seed: int = 0,
    stats: LayerStats | None = None,
) -> Pool:
    """What a merge gets: expert 0 with arrivals of experts 1 and 2."""
    rng = torch.Generator().manual_seed(seed)
    return Pool(
        own=torch.randn(own, parts, features, generator=rng),
        own_weight=0.3,
        incoming=torch.randn(arrivals, parts, features, generator=rng),
        incoming_weight=torch.rand(arrivals, generator=rng),
        partner=torch.randint(own, (arrivals,), generator=rng),
        affinity=torch.rand(arrivals, generator=rng),
        expert=0,
        incoming_expert=1 + torch.arange(arrivals) % 2,
        act=_silu,
        stats=LayerStats(0) if stats is None else stats,
    )


def permute_experts(bank: ExpertBank, order: Int64[Tensor, " experts"]) -> ExpertBank:
    """The same bank with expert ``order[i]`` in place i."""
    return replace(
        bank,
        gate=_take(bank.gate, order),
        up=bank.up[order],
        down=bank.down[order],
        gate_bias=_take(bank.gate_bias, order),
        up_bias=_take(bank.up_bias, order),
        down_bias=_take(bank.down_bias, order),
        router=bank.router[order],
        route=softmax_route(bank.router[order], bank.dims.top_k),
        per_expert={name: tensor[order] for name, tensor in bank.per_expert.items()},
    )


def permute_neurons(bank: ExpertBank, expert: int, order: Int64[Tensor, " width"]) -> ExpertBank:
    """The same bank, the neurons of one expert in another order: every expert computes what it did."""
    return copy_expert(bank, expert, expert, order)


def copy_expert(bank: ExpertBank, source: int, target: int, order: Int64[Tensor, " width"]) -> ExpertBank:
    """The same bank, expert ``target`` replaced by a copy of ``source`` with its neurons in another order."""

    def put(tensor: Tensor, value: Tensor) -> Tensor:
        out = tensor.clone()
        out[target] = value
        return out

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else put(tensor, tensor[source][order])

    return replace(
        bank,
        gate=rows(bank.gate),
        up=put(bank.up, bank.up[source][order]),
        down=put(bank.down, bank.down[source][:, order]),
        gate_bias=rows(bank.gate_bias),
        up_bias=rows(bank.up_bias),
        down_bias=None if bank.down_bias is None else put(bank.down_bias, bank.down_bias[source]),
    )


def permute_stats(stats: LayerStats, order: Int64[Tensor, " experts"]) -> LayerStats:
    """The statistics of :func:`permute_experts`."""
    values = {name: value if name.startswith("sample") else value[order] for name, value in stats.values.items()}
    return LayerStats(stats.tokens, values, stats.sample_size)


def as_bank(layer: CompressedLayer, source: ExpertBank) -> ExpertBank:
    """A compressed layer as a bank again, with the dims that follow: to compute with it, or compress it once more."""
    kept, width = layer.up.shape[:2]
    return ExpertBank(
        dims=replace(source.dims, experts=kept, width=width),
        gate=layer.gate,
        up=layer.up,
        down=layer.down,
        gate_bias=layer.gate_bias,
        up_bias=layer.up_bias,
        down_bias=layer.down_bias,
        router=layer.router,
        per_expert=layer.per_expert,
        act=source.act,
        route=softmax_route(layer.router, source.dims.top_k),
    )


def _take(tensor: Tensor | None, order: Tensor) -> Tensor | None:
    return None if tensor is None else tensor[order]
