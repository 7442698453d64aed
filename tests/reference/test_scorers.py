"""The fast scorers and selectors against the slow ones of `tests.reference.scorers`."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dernkit.builtin.output_scorers import RankedChoice, Reconstruction
from dernkit.builtin.protection import Protect
from dernkit.builtin.scorers import Ean, GateMass, Man, Msan, Reap
from dernkit.builtin.selectors import BestSubset
from dernkit.builtin.weight_scorers import Aimer, WeightNorm
from dernkit.testing.banks import random_bank, random_stats
from dernkit.types import ExpertBank, LayerStats, Routing
from tests.reference import scorers as slow

KINDS = {
    "plain": {},
    "ungated": {"gated": False},
    "biases": {"bias": True},
    "ungated biases": {"gated": False, "bias": True},
    "groups": {"experts": 8, "groups": 2},
    "one choice": {"experts": 7, "top_k": 1, "width": 3, "hidden": 9},
}
ROUTES = {"among chosen": True, "among all": False}


def close(fast: torch.Tensor, expected: list[float]) -> None:
    torch.testing.assert_close(fast, torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-7)


def route_with(router: torch.Tensor, bias: torch.Tensor, top_k: int, renormalise: bool) -> Callable[..., Routing]:
    """A router with a bias on its logits."""

    def route(inputs: torch.Tensor, experts: torch.Tensor | None = None) -> Routing:
        logits = inputs @ router.T + bias
        if experts is not None:
            masked = torch.full_like(logits, -torch.inf)
            masked[:, experts] = logits[:, experts]
            logits = masked
        chosen = torch.argsort(logits, dim=1, descending=True, stable=True)[:, :top_k]
        if renormalise:
            return Routing(chosen, logits.gather(1, chosen).softmax(dim=1), logits)
        return Routing(chosen, logits.softmax(dim=1).gather(1, chosen), logits)

    return route


def case(
    kind: str, renormalise: bool = True, *, dead: bool = True, sample: int = 12, seed: int = 0
) -> tuple[ExpertBank, LayerStats, list[list[float]], slow.Route]:
    """A bank whose expert 1 is never chosen while there are others, its statistics, tokens and slow route."""
    bank = random_bank(**{"experts": 6, "width": 5, "hidden": 4, "seed": seed, **KINDS[kind]})
    bias = torch.zeros(bank.dims.experts)
    bias[1] = -50 if dead else 0
    bank = replace(bank, route=route_with(bank.router, bias, bank.dims.top_k, renormalise))
    stats = random_stats(bank, sample=sample, seed=seed)
    route = slow.softmax_route(
        bank.router.double().tolist(), bias.double().tolist(), bank.dims.top_k, renormalise=renormalise
    )
    return bank, stats, stats["sample"].double().tolist(), route


@pytest.mark.parametrize("normalise", ["routed", "all"])
def test_statistics(normalise: str) -> None:
    draw = random.Random(0)
    experts, names = 6, ("routed", "gate_sum", "output_norm_sum", "output_sq_sum", "reap_sum")
    tokens = [[(e, draw.random(), 3 * draw.random()) for e in draw.sample(range(5), 2)] for _ in range(50)]
    sums = {name: torch.zeros(experts, dtype=torch.float64) for name in names}
    for expert, gate, norm in (event for token in tokens for event in token):
        for name, value in zip(names, (1, gate, norm, norm**2, gate * norm), strict=True):
            sums[name][expert] += value
    bank, stats = random_bank(experts), LayerStats(len(tokens), sums)
    close(GateMass(normalise=normalise).score(bank, stats), slow.gate_mass(tokens, experts, normalise))
    close(Ean().score(bank, stats), slow.ean(tokens, experts))
    close(Man(normalise=normalise).score(bank, stats), slow.activation_mean(tokens, experts, 1, normalise))
    close(Msan(normalise=normalise).score(bank, stats), slow.activation_mean(tokens, experts, 2, normalise))
    close(Reap(normalise=normalise).score(bank, stats), slow.reap(tokens, experts, normalise))


@pytest.mark.parametrize("kind", KINDS)
def test_weights(kind: str) -> None:
    bank, stats, _, _ = case(kind)
    bank.up[2], bank.down[2] = 0, 0
    present = ("up", "down") if bank.gate is None else ("gate", "up", "down")
    close(WeightNorm().score(bank, stats), slow.weight_norm(bank, present))
    close(WeightNorm(parts=("down",)).score(bank, stats), slow.weight_norm(bank, ["down"]))
    close(WeightNorm(parts=("down", "up")).score(bank, stats), slow.weight_norm(bank, ["up", "down"]))
    close(Aimer().score(bank, stats), slow.aimer(bank, present))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("renormalise", ROUTES.values(), ids=ROUTES)
def test_reconstruction(kind: str, renormalise: bool) -> None:
    bank, stats, tokens, route = case(kind, renormalise)
    close(Reconstruction().score(bank, stats), slow.leave_one_out(bank, tokens, route))
    gone = slow.backward(bank, tokens, route, bank.dims.smallest_keep)
    scores = Reconstruction(order="greedy").score(bank, stats)
    highest, expected = 0.0, [0.0] * bank.dims.experts
    for expert, cost in gone:
        highest = max(highest, cost)
        expected[expert] = highest
    needed = sorted(set(range(bank.dims.experts)) - {expert for expert, _ in gone}, reverse=True)
    for expert in needed:
        expected[expert] = max(1.0, highest)
    close(scores, expected)
    order = sorted(range(bank.dims.experts), key=lambda expert: (float(scores[expert]), -expert))
    assert order == [expert for expert, _ in gone] + needed, "of equal scores the lowest index stays"


@pytest.mark.parametrize("bias", [True, False])
def test_reconstruction_where_coefficients_come_before_the_experts(bias: bool) -> None:
    bank, stats, tokens, route = case("biases" if bias else "plain", False)
    bank = replace(bank, coefficient_on_input=True)
    close(Reconstruction().score(bank, stats), slow.leave_one_out(bank, tokens, route))
    gone = slow.backward(bank, tokens, route, 3)
    kept = BestSubset(exhaustive=0).select(bank, torch.zeros(6, dtype=torch.float64), 3, stats).kept
    assert sorted([*kept.tolist(), *(expert for expert, _ in gone)]) == list(range(6))


def test_reconstruction_reads_the_first_tokens_of_the_sample() -> None:
    bank, stats, tokens, route = case("plain", sample=30)
    close(Reconstruction(tokens=7).score(bank, stats), slow.leave_one_out(bank, tokens[:7], route))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_best_subset(kind: str, seed: int) -> None:
    bank, stats, tokens, route = case(kind, seed == 1, seed=seed)
    scores = torch.rand(bank.dims.experts, dtype=torch.float64)
    found = BestSubset().select(bank, scores, 4, stats)
    assert found.kept.tolist() == slow.best_subset(bank, tokens, route, 4)
    assert torch.equal(found.scores, scores) and found.group is None
    gone = [expert for expert, _ in slow.backward(bank, tokens, route, 4)]
    greedy = BestSubset(exhaustive=3).select(bank, scores, 4, stats).kept.tolist()
    assert sorted(greedy + gone) == list(range(bank.dims.experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ballot", ["all", "first"])
@pytest.mark.parametrize("renormalise", ROUTES.values(), ids=ROUTES)
def test_ranked_choice(kind: str, ballot: str, renormalise: bool) -> None:
    bank, stats, tokens, route = case(kind, renormalise, sample=40)
    gone = slow.ranked_choice(bank, tokens, route, ballot)
    expected = [float(len(gone))] * bank.dims.experts
    for place, expert in enumerate(gone):
        expected[expert] = float(place)
    assert RankedChoice(ballot=ballot).score(bank, stats).tolist() == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("factor", [1.0, 1.5, 3.0])
def test_super_experts(kind: str, factor: float) -> None:
    bank, stats, tokens, route = case(kind, sample=40)
    bank.down[3] *= 4
    protected = slow.super_experts(bank, tokens, route, factor)
    assert 1 not in protected and (factor > 1 or protected), "dead experts are not extreme, some expert is"
    plain = Reap().score(bank, stats)
    lifted = Protect(factor=factor).score(bank, stats)
    others = [expert for expert in range(bank.dims.experts) if expert not in protected]
    assert torch.equal(lifted[others], plain[others])
    highest = plain[others].max()
    assert all(lifted[expert] > highest for expert in protected)
    assert all(lifted[expert] == plain[expert] for expert in protected if plain[expert] > lifted[others].max())
