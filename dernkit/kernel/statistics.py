"""Calibration statistics of one MoE layer, accumulated batch by batch as float64 sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.errors import CheckpointError, ContractError
from dernkit.types import ExpertBank, LayerDims, LayerStats

Reader = tuple[str, str, frozenset[str]]
"""Kind and name of a component, and the statistics that it reads."""

_OUTPUT_STATISTICS = frozenset({"output_norm_sum", "output_sq_sum", "reap_sum", "output_sum"})


class Accumulator:
    """Sums over the tokens of one layer; only the statistics in ``requires`` are computed.

    Args:
        dims: the layer's sizes.
        requires: names from `dernkit.types.STATISTICS`.
        sample_size: capacity of the reservoir, used when ``requires`` has ``sample``.
        seed: seed of the reservoir.
        first_token: index of the first token that `update` will see, so that a later part of a token stream can be
            accumulated on its own and added.
        held_out: tokens at the end that `LayerStats.held_out` counts.
    """

    def __init__(
        self,
        dims: LayerDims,
        requires: frozenset[str],
        *,
        sample_size: int,
        seed: int,
        first_token: int = 0,
        held_out: int = 0,
    ) -> None:
        self._dims = dims
        self._requires = requires
        self._sample_size = sample_size if "sample" in requires else 0
        self._seed = seed
        self._held_out = held_out
        self._next = first_token
        shapes: dict[str, tuple[int, ...]] = {name: (dims.experts,) for name in requires if name != "sample"}
        if "output_sum" in requires:
            shapes["output_sum"] = (dims.experts, dims.hidden)
        self._sums = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in sorted(shapes.items())}
        self._tokens = 0
        self._reservoir: dict[str, Tensor] = {}

    @property
    def samples(self) -> bool:
        """Whether a reservoir is drawn."""
        return self._sample_size > 0

    def update(
        self,
        bank: ExpertBank,
        inputs: Float[Tensor, "n hidden"],
        chosen: Int64[Tensor, "n top_k"],
        coefficients: Float[Tensor, "n top_k"],
        router_inputs: Float[Tensor, "n router_hidden"] | None = None,
    ) -> None:
        """Add one batch: what the experts saw, whom the router chose, and the coefficients it multiplies with.

        ``router_inputs`` is what the router saw, where that is something else.

        Numbers from E on are experts that compute nothing (identity, skip): they count for nobody, and neither does a
        choice with coefficient 0.
        ``bank`` is read for expert outputs only, and not kept: the layer may be dropped after the call.
        """
        dims = self._dims
        if chosen.shape[1] != dims.top_k:
            raise ContractError(
                f"layer {dims.layer}: the router must choose {dims.top_k} experts a token. Got {chosen.shape[1]}."
            )
        weights = coefficients.to(torch.float64)
        chosen = chosen.masked_fill((chosen >= dims.experts) | (weights == 0), dims.experts)  # no routed expert
        self._add("routed", _per_expert(chosen, torch.ones_like(weights), dims.experts))
        self._add("gate_sum", _per_expert(chosen, weights, dims.experts))
        if self._requires & _OUTPUT_STATISTICS:
            sums = {
                name: torch.zeros_like(self._sums[name], device=inputs.device)
                for name in sorted(self._requires & _OUTPUT_STATISTICS)
            }
            for expert in range(dims.experts):
                _add_outputs(sums, bank, expert, inputs, chosen, weights)
            for name, value in sums.items():
                self._add(name, value)
        if self._sample_size:
            self._sample(inputs, router_inputs)
        self._tokens += len(inputs)
        self._next += len(inputs)

    def _add(self, name: str, value: Tensor) -> None:
        if name in self._sums:
            self._sums[name] += value.cpu()

    def _sample(self, inputs: Tensor, router_inputs: Tensor | None) -> None:
        token = torch.arange(self._next, self._next + len(inputs))
        rows = {"sample_key": sample_keys(self._seed, token), "sample_token": token, "sample": inputs.cpu()}
        if router_inputs is not None:
            rows["router_sample"] = router_inputs.cpu()
        if self._reservoir:
            rows = {name: torch.cat([self._reservoir[name], new]) for name, new in rows.items()}
        order = torch.argsort(rows["sample_key"], stable=True)[: self._sample_size]
        self._reservoir = {name: value[order].clone() for name, value in rows.items()}

    def stats(self) -> LayerStats:
        """What has been accumulated so far, on the CPU."""
        values = dict(self._sums)
        if self._sample_size:
            if not self._reservoir:
                raise ContractError(f"layer {self._dims.layer}: a sample must be drawn from at least one token.")
            values |= self._reservoir
        return LayerStats(self._tokens, values, self._sample_size, self._held_out)


def _add_outputs(
    sums: Mapping[str, Tensor], bank: ExpertBank, expert: int, inputs: Tensor, chosen: Tensor, weights: Tensor
) -> None:
    rows, columns = torch.where(chosen == expert)
    if not len(rows):
        return
    seen, coefficients = inputs[rows], weights[rows, columns]
    if bank.coefficient_on_input:
        seen, coefficients = seen * coefficients[:, None].to(seen.dtype), torch.ones_like(coefficients)
    outputs = bank.output(expert, seen).to(torch.float64)
    norms = outputs.norm(dim=1)
    for name, value in (
        ("output_norm_sum", norms.sum()),
        ("output_sq_sum", norms.square().sum()),
        ("reap_sum", (coefficients * norms).sum()),
        ("output_sum", outputs.sum(dim=0)),
    ):
        if name in sums:
            sums[name][expert] += value


def _per_expert(chosen: Int64[Tensor, "n top_k"], values: Tensor, experts: int) -> Tensor:
    sums = torch.zeros(experts + 1, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, chosen.reshape(-1), values.reshape(-1))[:experts]


def sample_keys(seed: int, token: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Keys of tokens by their index in the stream; the reservoir keeps the smallest (bottom-k sampling).

    splitmix64 of (seed, token index), computed with int64 wrap-around, so that a token's key depends on nothing else:
    reservoirs of two parts of a stream can be joined, and all layers sample the same tokens.
    """
    x = (token + 1) * _signed(0x9E3779B97F4A7C15)
    x = x + _signed((seed * 0xD1342543DE82EF95 + 0x2545F4914F6CDD1D) % 2**64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ _unsigned_shift(x, shift)) * _signed(factor)
    return x ^ _unsigned_shift(x, 31)


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _unsigned_shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def refuse_lacking(stats: Mapping[int, LayerStats], readers: Sequence[Reader], where: str, fix: str) -> None:
    """Hold statistics against what components read.

    Raises:
        CheckpointError: a layer lacks something.
    """
    held = set.intersection(*(set(layer.values) for layer in stats.values())) if stats else set()
    for kind, name, requires in readers:
        lacking = sorted(requires - held)
        if lacking:
            raise CheckpointError(
                f"{kind} '{name}' reads {', '.join(lacking)}: {where} must hold it. "
                f"Got only {', '.join(sorted(held)) or 'nothing'} instead. {fix}"
            )
