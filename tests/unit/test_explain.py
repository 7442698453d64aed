"""Blocks that no family has, with names that say nothing or lie: explained by what they compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dernkit.api import LayerDims
from dernkit.errors import CheckpointError
from dernkit.models.explain.agreement import contradictions, unpacked
from dernkit.models.explain.explanation import Explanation, explain
from dernkit.types import ExpertBank

HIDDEN, EXPERTS, WIDTH = 16, 6, 10
CALL: Any = ((torch.empty(1, 48, HIDDEN, device="meta"),), {})


def explained(block: nn.Module) -> Explanation:
    found = explain(block, *CALL)
    assert found is not None
    assert (found.experts, found.top_k, found.width, found.hidden) == (EXPERTS, 2, WIDTH, HIDDEN)
    assert found.unexplained == ()
    return found


def roles(found: Explanation) -> dict[str, tuple[str, bool]]:
    return {weight.name: (weight.role, weight.transposed) for weight in found.weights}


class Routed(nn.Module):
    """A block whose router is called ``noise``; ``ear`` is a bias that takes part in the choice alone."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Linear(HIDDEN, EXPERTS, bias=False)
        self.register_buffer("ear", torch.zeros(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        scores = self.noise(flat).sigmoid()
        chosen = (scores + self.ear).topk(2, dim=-1).indices
        out = torch.zeros_like(flat)
        for e in range(EXPERTS):
            token = torch.where(chosen == e)[0]
            if len(token) == 0:  # control flow that depends on data
                continue
            out[token] += scores[token, e, None] * self.expert(e, flat[token])
        return out.view_as(x)

    def expert(self, e: int, x: Tensor) -> Tensor:
        raise NotImplementedError


class Mlp(nn.Module):
    """``w_up`` leads down, ``w_down`` is the gate, ``first`` is up."""

    def __init__(self) -> None:
        super().__init__()
        self.w_up, self.w_down = nn.Linear(WIDTH, HIDDEN, bias=False), nn.Linear(HIDDEN, WIDTH, bias=False)
        self.first = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_up(self.first(x) * nn.functional.gelu(self.w_down(x)))


class Listed(Routed):
    def __init__(self) -> None:
        super().__init__()
        self.router = nn.ModuleList(Mlp() for _ in range(EXPERTS))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.router[e](x)


class Interleaved(Routed):
    """[2W, E, H] with up before gate, and [W, H, E]: experts along odd dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.empty(2 * WIDTH, EXPERTS, HIDDEN))
        self.b = nn.Parameter(torch.empty(WIDTH, HIDDEN, EXPERTS))

    def expert(self, e: int, x: Tensor) -> Tensor:
        rows = x @ self.a[:, e].T
        return (rows[:, ::2] * nn.functional.silu(rows[:, 1::2])) @ self.b[:, :, e]


class Ungated(Routed):
    """[E, H, W] with biases, ReLU; the router has a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.noise = nn.Linear(HIDDEN, EXPERTS, bias=True)
        self.up, self.down = (
            nn.Parameter(torch.empty(EXPERTS, WIDTH, HIDDEN)),
            nn.Parameter(torch.empty(EXPERTS, HIDDEN, WIDTH)),
        )
        self.p, self.q = nn.Parameter(torch.empty(EXPERTS, WIDTH)), nn.Parameter(torch.empty(EXPERTS, HIDDEN))

    def expert(self, e: int, x: Tensor) -> Tensor:
        return nn.functional.relu(x @ self.down[e] + self.p[e]) @ self.up[e] + self.q[e]


class Flat(Routed):
    """All experts in two dimensions, halves of a matrix, and a scale of each expert's output."""

    def __init__(self) -> None:
        super().__init__()
        self.x, self.y = (
            nn.Parameter(torch.empty(EXPERTS * 2 * WIDTH, HIDDEN)),
            nn.Parameter(torch.empty(EXPERTS * HIDDEN, WIDTH)),
        )
        self.z = nn.Parameter(torch.empty(EXPERTS))

    def expert(self, e: int, x: Tensor) -> Tensor:
        gate, up = (x @ self.x.view(EXPERTS, -1, HIDDEN)[e].T).chunk(2, dim=-1)
        return self.z[e] * (nn.functional.silu(gate) * up) @ self.y.view(EXPERTS, HIDDEN, -1)[e].T


def test_experts_in_a_list_with_names_that_lie():
    found = explained(Listed())
    assert found.order == "separate"
    assert roles(found) == {
        "router.*.w_up.weight": ("down", False),
        "router.*.w_down.weight": ("gate", False),
        "router.*.first.weight": ("up", False),
    }
    assert (found.router, found.router_rows, found.choice_biases) == ("noise.weight", EXPERTS, ("ear",))
    assert (found.logit_biases, found.scales, found.upstream) == ((), (), ())


def test_rows_in_turns_with_up_first_and_experts_along_any_dimension():
    found = explained(Interleaved())
    assert found.order == "up first, interleaved"
    assert roles(found) == {"a": ("gate and up", False), "b": ("down", True)}
    assert [weight.dim for weight in found.weights if weight.name == "a"] == [1]


def test_no_gate_biases_and_a_bias_of_the_logits():
    found = explained(Ungated())
    assert found.order == "no gate"
    assert roles(found) == {
        "up": ("down", True),
        "down": ("up", True),
        "p": ("up bias", False),
        "q": ("down bias", False),
    }
    assert (found.router, found.choice_biases, found.logit_biases) == ("noise.weight", ("ear",), ("noise.bias",))


def test_experts_and_rows_in_one_dimension_and_a_scale():
    found = explained(Flat())
    assert found.order == "concatenated"
    assert roles(found) == {"x": ("gate and up", False), "y": ("down", False)}
    assert [weight.each for weight in found.weights] == [HIDDEN, 2 * WIDTH]
    assert found.scales == ("z",)


@pytest.mark.parametrize("block", [Listed, Interleaved, Ungated, Flat])
def test_the_weights_that_were_found_compute_what_the_block_computes(block: type[Routed]):
    module = block()
    found = explained(module)
    with torch.no_grad():
        for parameter in module.parameters():
            nn.init.normal_(parameter)
        x = torch.randn(5, HIDDEN)
        parts = unpacked(module, found)
        rows = {name: torch.einsum("ewh,nh->enw", parts[name], x) for name in ("gate", "up") if name in parts}
        if block is Ungated:
            neurons = nn.functional.relu(rows["up"] + parts["up bias"][:, None])
        else:
            neurons = {Listed: nn.functional.gelu}.get(block, nn.functional.silu)(rows["gate"]) * rows["up"]  # type: ignore[call-overload]
        mine = torch.einsum("ehw,enw->enh", parts["down"], neurons)
        mine = mine + parts["down bias"][:, None] if block is Ungated else mine
        for e in range(EXPERTS):
            scale = module.z[e] if isinstance(module, Flat) else 1
            torch.testing.assert_close(scale * mine[e], module.expert(e, x), rtol=1e-4, atol=1e-4)


def test_a_dense_block_is_not_explained():
    assert explain(Mlp(), *CALL) is None


def test_a_block_that_cannot_run_says_so():
    with pytest.raises(CheckpointError, match=r"^here: must run on random weights to be explained\. Got '"):
        explain(nn.Linear(HIDDEN + 1, 3), *CALL, where="here")


class Claimed:
    """An adapter's block over `Flat` that takes gate for up if it is told to."""

    layer, path = 0, "layers.0.moe"

    def __init__(self, module: Flat, *, swapped: bool = False, forgets: tuple[str, ...] = ()) -> None:
        self.module, self.swapped, self.forgets = module, swapped, forgets
        self.dims = LayerDims(layer=0, experts=EXPERTS, top_k=2, width=WIDTH, hidden=HIDDEN)

    def bank(self) -> ExpertBank:
        gate, up = self.module.x.data.view(EXPERTS, 2, WIDTH, HIDDEN).unbind(1)
        if self.swapped:
            gate, up = up, gate
        return ExpertBank(
            dims=self.dims,
            gate=gate,
            up=up,
            down=self.module.y.data.view(EXPERTS, HIDDEN, WIDTH),
            gate_bias=None,
            up_bias=None,
            down_bias=None,
            router=self.module.noise.weight.data,
            per_expert={},
            act=lambda gate, up: up,
        )

    def tensors(self) -> dict[str, Tensor]:
        names = {"x", "y", "z", "ear", "noise.weight"} - set(self.forgets)
        return {f"{self.path}.{name}": torch.empty(0) for name in names}


def test_an_adapter_that_is_right_is_not_contradicted():
    module = Flat()
    found = explained(module)
    assert contradictions(Claimed(module), module, found) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"swapped": True}, ["the gate must be", "the up must be"]),
        ({"forgets": ("ear",)}, ["'ear' must be cut with the experts"]),
        ({"forgets": ("z",)}, ["'z' must be cut with the experts"]),
    ],
)
def test_an_adapter_that_is_wrong_is_contradicted(wrong: dict[str, Any], said: list[str]):
    module = Flat()
    sentences = contradictions(Claimed(module, **wrong), module, explained(module))  # type: ignore[arg-type]
    assert [sentence[: len(begin)] for sentence, begin in zip(sentences, said, strict=True)] == said
