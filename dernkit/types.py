"""The records that flow between the stages. Frozen, slotted, without behaviour beyond views of themselves.

Legend of the shape letters used in every annotation of the package:

=========  =====================================================================================
experts    E, routed experts of one MoE layer in the source model
kept       K, experts that stay, in ascending order of their source index
width      W, intermediate neurons of one expert
hidden     H, size of the vectors that an expert reads and writes
parts      P, 3 with a gate (gate row, up row, down column), 2 without
features   D, H, or H + 1 where experts carry gate/up biases (the bias is the last feature)
moves      M, segments that go to a kept expert
sampled    n, reservoir-sampled layer inputs
=========  =====================================================================================

A *segment* is one neuron of one expert: its P parts of D features each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.errors import ContractError

Activation = Callable[[Tensor | None, Tensor], Tensor]
"""``(gate pre-activation [n, W] or None, up pre-activation [n, W]) -> neuron activations [n, W]``."""


@dataclass(frozen=True, slots=True)
class LayerDims:
    """Sizes and routing rules of one MoE layer; ``layer`` is the decoder layer's number."""

    layer: int
    experts: int
    top_k: int
    width: int
    hidden: int
    groups: int = 1
    top_k_groups: int = 1
    candidates_per_group: int = 1
    """Experts per group that the router's group score looks at (2 in DeepSeek-V3 even in a single group, 1 in V2)."""

    @property
    def smallest_keep(self) -> int:
        """Fewest experts with which the router still works as the family defines it."""
        per_group = max(self.candidates_per_group, -(-self.top_k // self.top_k_groups))
        return self.groups * per_group


@dataclass(frozen=True, slots=True)
class Routing:
    """What a router does with n tokens; experts by their index in the source layer (E and above: identity experts)."""

    chosen: Int64[Tensor, "sampled top_k"]
    coefficients: Float[Tensor, "sampled top_k"]
    """float32: what the model multiplies the expert's output (or input) with. Unused choices have 0."""
    logits: Float[Tensor, "sampled experts"]
    """float32, before any softmax or sigmoid, a bias of the router's own included; −∞ for masked experts."""
    features: Float[Tensor, "sampled row"] | None = None
    """What the router's rows are multiplied with: its inputs, normalised or projected where the family does that."""


@runtime_checkable
class Route(Protocol):
    """The model's own router."""

    def __call__(self, inputs: Tensor, experts: Tensor | None = None, rows: Tensor | None = None) -> Routing:
        """What it does with router inputs [n, ·].

        Args:
            inputs: of `LayerStats.router_inputs`.
            experts: those that it chooses among, by their index [K]; all other logits are masked. None: all.
            rows: router rows [K, row] of these experts instead of their own; where the family adds a bias to the
                logits, it is the last feature of each row.
        """
        ...


@dataclass(frozen=True, slots=True)
class ExpertWeights:
    """The weights of one layer's routed experts as canonical tensors."""

    gate: Float[Tensor, "experts width hidden"] | None
    up: Float[Tensor, "experts width hidden"]
    down: Float[Tensor, "experts hidden width"]
    gate_bias: Float[Tensor, "experts width"] | None = None
    up_bias: Float[Tensor, "experts width"] | None = None
    down_bias: Float[Tensor, "experts hidden"] | None = None


@dataclass(frozen=True, slots=True)
class ExpertBank:
    """All routed experts of one layer as canonical tensors in the checkpoint's dtype (views where possible)."""

    dims: LayerDims
    gate: Float[Tensor, "experts width hidden"] | None
    up: Float[Tensor, "experts width hidden"]
    down: Float[Tensor, "experts hidden width"]
    gate_bias: Float[Tensor, "experts width"] | None
    up_bias: Float[Tensor, "experts width"] | None
    down_bias: Float[Tensor, "experts hidden"] | None
    router: Float[Tensor, "experts router_hidden"]
    per_expert: Mapping[str, Tensor]
    """Other tensors with one entry per expert (correction biases, scales), by in-memory name: sliced, never summed."""
    act: Activation
    finish: Callable[[Tensor], Tensor] | None = None
    """What follows the down projection inside an expert, the same for all of them (a norm): ``[n, H] -> [n, H]``."""
    coefficient_on_input: bool = False
    """Whether the model computes ``E_e(c x)`` (Llama-4) instead of ``c E_e(x)``."""
    tables: Mapping[str, Int64[Tensor, "tokens top_k"]] = field(default_factory=dict)
    """Tables of expert numbers (DeepSeek-V4's hash routing), by in-memory name: rewritten when experts go."""
    router_bias: str | None = None
    """Name in ``per_expert`` of a bias [E] that is added to the logits, not in the choice alone."""
    route: Route | None = None
    """Routes sampled inputs (``stats.router_inputs``) among some of the experts."""

    @property
    def has_bias(self) -> bool:
        """Whether segments carry a gate or up bias as their last feature."""
        return self.up_bias is not None or self.gate_bias is not None

    def segments(self, expert: int) -> Float[Tensor, "width parts features"]:
        """One expert's neurons in float32: gate row, up row, down column; biases appended as a last feature.

        The down column has no bias of its own; its last feature is 0, so that averages and norms are unaffected.
        """
        rows = [] if self.gate is None else [(self.gate, self.gate_bias)]
        rows.append((self.up, self.up_bias))
        parts = []
        for weight, bias in rows:
            part = weight[expert].to(torch.float32)
            if self.has_bias:
                last = part.new_zeros(len(part)) if bias is None else bias[expert].to(torch.float32)
                part = torch.cat([part, last[:, None]], dim=1)
            parts.append(part)
        column = self.down[expert].to(torch.float32).T
        if self.has_bias:
            column = torch.nn.functional.pad(column, (0, 1))
        return torch.stack([*parts, column], dim=1)

    def output(self, expert: int, inputs: Float[Tensor, "n hidden"]) -> Float[Tensor, "n hidden"]:
        """``E_e(x)`` in float32, before the router's coefficient."""
        x = inputs.to(torch.float32)
        up = _linear(x, self.up[expert], None if self.up_bias is None else self.up_bias[expert])
        gate = None
        if self.gate is not None:
            gate = _linear(x, self.gate[expert], None if self.gate_bias is None else self.gate_bias[expert])
        neurons = self.act(gate, up)
        out = _linear(neurons, self.down[expert], None if self.down_bias is None else self.down_bias[expert])
        return out if self.finish is None else self.finish(out)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    bias = None if bias is None else bias.to(torch.float32)
    return torch.nn.functional.linear(x, weight.to(torch.float32), bias)


STATISTICS: Mapping[str, str] = {
    "routed": "[E] tokens for which the router chose the expert with a coefficient other than 0",
    "gate_sum": "[E] sum of the coefficient with which the model multiplies the expert's output (or input)",
    "output_norm_sum": "[E] sum of ||E_e(x)||_2 over routed tokens",
    "output_sq_sum": "[E] sum of ||E_e(x)||_2^2 over routed tokens",
    "reap_sum": "[E] sum of the norm of what the expert adds, coefficient * ||E_e(x)||_2, over routed tokens",
    "output_sum": "[E, H] sum of E_e(x) over routed tokens",
    "sample": "[n, H] seeded reservoir of the experts' inputs, with its keys in `sample_key` [n] and, in "
    "`sample_token` [n], the tokens' indices in the calibration text; `router_inputs` are the same tokens as the "
    "router sees them",
}
"""Statistics that a component may name in ``requires``; `tokens` is always there. Sums are float64."""

SAMPLED = frozenset({"sample", "sample_key", "sample_token", "router_sample"})
"""What a reservoir holds; ``router_sample`` is there only where the router sees something else than the experts."""


@dataclass(frozen=True, slots=True)
class LayerStats:
    """Calibration statistics of one layer. Sums only, so that ``stats(A) + stats(B) = stats(A ++ B)``.

    Args:
        tokens: tokens that reached the layer.
        values: statistic name -> tensor; see :data:`STATISTICS`.
        sample_size: capacity of the reservoir (0 when no sample was asked for).
        held_out: tokens at the end of the text of which no component sees samples; results are judged on them.
    """

    tokens: int
    values: Mapping[str, Tensor] = field(default_factory=dict)
    sample_size: int = 0
    held_out: int = 0

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            known = ", ".join(sorted(self.values)) or "none"
            raise ContractError(
                f"statistic '{name}': must be declared in the component's `requires` to be collected. "
                f"Got only {known} instead. Add it to `requires`.",
                law="only_declared_statistics",
            )
        return self.values[name]

    @property
    def router_inputs(self) -> Float[Tensor, "sampled router_hidden"]:
        """The sampled tokens as the router sees them: the rows of `sample` for nearly all families."""
        return self.values.get("router_sample", self["sample"])

    @property
    def sampled_tokens(self) -> int:
        """Tokens of which components may see samples: they come before those that are held out."""
        return self.tokens - self.held_out

    def only(self, names: frozenset[str]) -> LayerStats:
        """The same statistics restricted to ``names``: what a component that declares them may see."""
        allowed = names | (SAMPLED if "sample" in names else frozenset())
        kept = {name: value for name, value in self.values.items() if name in allowed}
        return replace(self, values=kept)._samples(held_out=False)

    def to(self, device: torch.device) -> LayerStats:
        """The same on another device."""
        return replace(self, values={name: value.to(device) for name, value in self.values.items()})

    def judges(self) -> LayerStats:
        """The samples that are held out, and nothing else."""
        sampled = {name: value for name, value in self.values.items() if name in SAMPLED}
        return replace(self, values=sampled)._samples(held_out=True)

    def _samples(self, *, held_out: bool) -> LayerStats:
        if not self.held_out or "sample" not in self.values:
            return self
        rows = (self["sample_token"] >= self.sampled_tokens) == held_out
        values = {name: value[rows] if name in SAMPLED else value for name, value in self.values.items()}
        return replace(self, values=values)

    def __add__(self, other: LayerStats) -> LayerStats:
        """Statistics of both token sets together; the reservoirs are joined by their keys, and the end that is held out
        is that of the other."""
        sampled = [name for name in self.values if name in SAMPLED]
        both = {name: self[name] + other[name] for name in self.values if name not in SAMPLED}
        if sampled:
            order = torch.argsort(torch.cat([self["sample_key"], other["sample_key"]]), stable=True)
            kept = order[: self.sample_size]
            both |= {name: torch.cat([self[name], other[name]])[kept] for name in sampled}
        return LayerStats(self.tokens + other.tokens, both, self.sample_size, other.held_out)


@dataclass(frozen=True, slots=True)
class Retention:
    """Which experts of one layer stay, and with which of them the others belong together."""

    scores: Float[Tensor, " experts"]
    """float64; higher stays."""
    kept: Int64[Tensor, " kept"]
    """Source indices of the kept experts, ascending."""
    group: Int64[Tensor, " experts"] | None = None
    """Position among the kept of the expert that each expert is grouped with, its own for a kept one; −1: with none.
    None where the selector does not group."""

    @property
    def dropped(self) -> list[int]:
        """Source indices of the dropped experts, ascending."""
        kept = set(self.kept.tolist())
        return [expert for expert in range(len(self.scores)) if expert not in kept]


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which dropped segments go where, and which own ones kept experts give up.

    A dropped segment that is not listed is discarded, an own one that is not listed stays.
    """

    source: Int64[Tensor, " moves"]
    """expert * W + neuron, in the source layer."""
    target: Int64[Tensor, " moves"]
    """Position among the kept experts."""
    partner: Int64[Tensor, " moves"]
    """Neuron of the target expert that it matched best."""
    affinity: Float[Tensor, " moves"]
    scale: Float[Tensor, " moves"] | None = None
    """The c by which each segment's up part is multiplied and its down part divided before it is merged, which leaves
    its own output as it is but makes it more like its partner; None: 1 for all."""
    left: Int64[Tensor, " left"] | None = None
    """expert * W + neuron of the segments that kept experts leave behind, different and ascending; None: none."""

    @staticmethod
    def empty() -> Assignment:
        """No moves: plain pruning."""
        none = torch.empty(0, dtype=torch.int64)
        return Assignment(none, none, none, torch.empty(0))

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """All decisions for one layer: integers and floats, never weights."""

    layer: int
    experts: int
    width: int
    scores: Float[Tensor, " experts"]
    """float64; higher stays."""
    kept: Int64[Tensor, " kept"]
    """Source indices of the kept experts, ascending."""
    assignment: Assignment
    one_group: bool = False
    """Whether the router's groups become one, so that it chooses among all experts."""
    biased_rows: bool = False
    """Whether the rows that a router gets have the logits' bias as their last feature; the kernel says so to it."""

    @property
    def dropped(self) -> list[int]:
        """Source indices of the dropped experts, ascending."""
        kept = set(self.kept.tolist())
        return [expert for expert in range(self.experts) if expert not in kept]

    def stays(self, expert: int) -> Int64[Tensor, " own"]:
        """Neurons of a kept expert that it does not leave behind, ascending."""
        neurons = torch.arange(self.width)
        if self.assignment.left is None:
            return neurons
        return neurons[~torch.isin(expert * self.width + neurons, self.assignment.left)]

    def pool_sizes(self) -> list[int]:
        """Own segments that stay plus received ones of every kept expert."""
        received = torch.bincount(self.assignment.target, minlength=len(self.kept)).tolist()
        return [len(self.stays(expert)) + count for expert, count in zip(self.kept.tolist(), received, strict=True)]

    @property
    def changes_experts(self) -> bool:
        """Whether an expert goes, or another one gets or loses segments."""
        moves = self.assignment
        return len(self.kept) < self.experts or len(moves) > 0 or (moves.left is not None and len(moves.left) > 0)


@dataclass(frozen=True, slots=True)
class Pool:
    """What a merge sees for one kept expert: its own segments that stay and those that arrive, in float32."""

    own: Float[Tensor, "own parts features"]
    own_weight: float
    """Score of the kept expert, at least 0."""
    incoming: Float[Tensor, "moves parts features"]
    incoming_weight: Float[Tensor, " moves"]
    """Score of the expert that each segment comes from, at least 0."""
    partner: Int64[Tensor, " moves"]
    """Places in ``own``."""
    affinity: Float[Tensor, " moves"]
    expert: int
    """Source index of the kept expert."""
    incoming_expert: Int64[Tensor, " moves"]
    """Source index of the expert that each segment comes from."""
    act: Activation
    stats: LayerStats
    """Those that the merge ``requires``."""
    down_bias: Float[Tensor, "experts hidden"] | None = None
    """Down biases of all experts of the layer in the checkpoint's dtype; None where the family has none."""


@dataclass(frozen=True, slots=True)
class CompressedLayer:
    """The kept experts after surgery, in the checkpoint's dtype; same layout as :class:`ExpertBank`."""

    layer: int
    gate: Float[Tensor, "kept width hidden"] | None
    up: Float[Tensor, "kept width hidden"]
    down: Float[Tensor, "kept hidden width"]
    gate_bias: Float[Tensor, "kept width"] | None
    up_bias: Float[Tensor, "kept width"] | None
    down_bias: Float[Tensor, "kept hidden"] | None
    router: Float[Tensor, "kept router_hidden"]
    per_expert: Mapping[str, Tensor]
