"""Carve the feed-forward networks of a dense model into experts, one decoder layer after the other."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from benchmarks.testbeds.smol.correction import Corrector
from benchmarks.testbeds.smol.partition import Partition, split_neurons
from benchmarks.testbeds.smol.routing import coefficients, contributions, fit_router


@dataclass(frozen=True)
class Carving:
    """How to carve: sizes, and the constants of the closed forms."""

    shared: int = 768
    """Neurons of the shared expert."""
    experts: int = 24
    """Routed experts; they share the other neurons evenly."""
    top_k: int = 8
    """Experts that a token is routed to."""
    active: float = 0.25
    """Part of a token's neurons that counts as active."""
    spread: float = 0.2
    """Root mean square of a token's router logits about their mean; near 0 all chosen experts count the same."""
    router_ridge: float = 0.01
    """Penalty of the router's regression."""
    floor: float = 0.05
    """Part of the calibration tokens that every expert has to get."""
    down_ridge: float | None = 0.1
    """Penalty of the down projections' correction; None leaves them as they were, times `top_k`."""
    catch_up: float = 0.5
    """Part of the difference to the dense model's stream, at this layer's input, that the correction makes up for."""


@dataclass(frozen=True)
class CarvedLayer:
    """One layer's mixture.

    `router` [E, H] and `down` [H, W], the latter in the dense model's order of neurons and as the coefficients (which
    sum to 1 a token) need it: without a correction the columns of routed neurons are `top_k` times the dense model's.
    """

    partition: Partition
    router: Tensor
    down: Tensor
    top_k: int

    def features(self, inputs: Tensor, hidden: Tensor) -> Tensor:
        """`hidden` [n, W] times the coefficients of the neurons' experts for `inputs` [n, H]."""
        chosen = coefficients(inputs @ self.router.T, self.top_k)
        scaled = hidden.clone()
        experts = self.partition.experts
        scaled[:, experts.flatten()] *= chosen.repeat_interleave(experts.shape[1], dim=1)
        return scaled


def activations(mlp: Any, inputs: Tensor) -> Tensor:
    """What reaches the down projection of a gated feed-forward network [n, W]."""
    return silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)


def carve_layer(
    down: Tensor, inputs: Tensor, hidden: Tensor, targets: Tensor, weights: Tensor, plan: Carving
) -> CarvedLayer:
    """The mixture for one feed-forward network.

    Args:
        down: the dense network's down projection [H, W].
        inputs: what the carved model feeds it on the calibration tokens [n, H].
        hidden: its activations on them [n, W].
        targets: what the output should be [n, H]; only the correction looks at it.
        weights: what the correction multiplies a token's error with [n].
        plan: how to carve.
    """
    partition = split_neurons(
        hidden.abs() * down.norm(dim=0), plan.shared, plan.experts, round(plan.active * hidden.shape[1])
    )
    wanted = contributions(hidden, partition.experts, down)
    router = fit_router(inputs, wanted, plan.top_k, plan.spread, plan.router_ridge, plan.floor)
    scaled = down.clone()
    scaled[:, partition.experts.flatten()] *= plan.top_k
    layer = CarvedLayer(partition, router, scaled, plan.top_k)
    if plan.down_ridge is None:
        return layer
    sums = Corrector(*reversed(down.shape))
    for part in torch.arange(len(inputs)).split(4096):
        scale = weights[part, None]
        sums.add(layer.features(inputs[part], hidden[part]) * scale, targets[part] * scale)
    return CarvedLayer(partition, router, sums.solve(scaled, plan.down_ridge), plan.top_k)


class Stream:
    """The residual stream of `ids` [b, t], layer after layer."""

    def __init__(self, model: Any, ids: Tensor) -> None:
        self.model = model
        self.hidden = model.model.embed_tokens(ids)
        self.positions = model.model.rotary_emb(self.hidden, torch.arange(ids.shape[1])[None])

    def attend(self, layer: Any, batch: int = 8) -> Tensor:
        """Go through a layer's attention; the input of its feed-forward network [b·t, H]."""
        parts = [
            part
            + layer.self_attn(layer.input_layernorm(part), position_embeddings=self.positions, attention_mask=None)[0]
            for part in self.hidden.split(batch)
        ]
        self.hidden = torch.cat(parts)
        return layer.post_attention_layernorm(self.hidden).flatten(0, 1)

    def add(self, output: Tensor) -> None:
        """Add a feed-forward network's output [b·t, H]."""
        self.hidden = self.hidden + output.view_as(self.hidden)


@torch.no_grad()
def carve(model: Any, ids: Tensor, plan: Carving) -> Iterator[CarvedLayer]:
    """Carve a Llama, layer after layer, on the calibration tokens `ids` [b, t].

    A layer is fitted on what the layers carved before it feed it, and is asked for what the dense model's layer
    gives, plus `plan.catch_up` times what the stream has lost so far. A token's error counts relative to its stream,
    which the next norm divides by: the first token's is hundreds of times larger than the others'.
    """
    dense, carved = Stream(model, ids), Stream(model, ids)
    for layer in model.model.layers:
        dense_inputs, inputs = dense.attend(layer), carved.attend(layer)
        lost = (dense.hidden - carved.hidden).flatten(0, 1)
        dense_output, hidden = layer.mlp(dense_inputs), activations(layer.mlp, inputs)
        down = layer.mlp.down_proj.weight
        output = hidden @ down.T
        targets = output + plan.catch_up * (lost + dense_output - output)
        dense.add(dense_output)
        mixture = carve_layer(down, inputs, hidden, targets, 1 / dense.hidden.flatten(0, 1).norm(dim=1), plan)
        carved.add(mixture.features(inputs, hidden) @ mixture.down.T)
        yield mixture
