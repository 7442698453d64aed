"""The fast similarities against the slow formulas."""

from dataclasses import replace

import pytest
import torch

from dernkit.api import Match
from dernkit.builtin.activation_similarities import ActivationCorrelation, OutputContribution
from dernkit.builtin.expert_similarities import ExpertOutput, ExpertWeights, RouterLogits
from dernkit.builtin.matched import Hungarian
from dernkit.builtin.similarities import Cosine
from dernkit.testing.banks import random_bank, random_stats
from dernkit.types import ExpertBank, LayerStats
from tests.reference import similarities as slow

KINDS = [
    pytest.param({"gated": gated, "bias": bias}, id=f"{'gated' if gated else 'plain'}-{'bias' if bias else 'nobias'}")
    for gated in (True, False)
    for bias in (True, False)
]
GATED = KINDS[:2]
DROPPED, KEPT = 1, torch.tensor([0, 3])
WIDTH = 6


def bank_of(kind: dict) -> ExpertBank:
    """Neuron 2 of expert 0 and neuron 4 of expert 1 are dead, and so is neuron 5 of expert 1 but for its biases."""
    bank = random_bank(4, WIDTH, 3, **kind)
    for expert, neuron in ((0, 2), (1, 4), (1, 5)):
        for tensor in (bank.gate, bank.up) if bank.gate is not None else (bank.up,):
            tensor[expert, neuron] = 0
        bank.down[expert, :, neuron] *= neuron == 5
        for tensor in (bank.gate_bias, bank.up_bias):
            if tensor is not None:
                tensor[expert, neuron] *= neuron == 5
    return bank


def inputs_of(stats: LayerStats, count: int | None = None) -> list[list[float]]:
    return stats["sample"][:count].double().tolist()


def close(fast: torch.Tensor, values: list) -> None:
    torch.testing.assert_close(fast.double(), torch.tensor(values, dtype=torch.float64), rtol=1e-5, atol=2e-6)


def assert_matches(match: Match, expected: list[list[tuple[float, int]]]) -> None:
    """``expected``: for each kept expert the affinity and partner of every neuron."""
    for column, found in enumerate(expected):
        close(match.affinity[:, column], [value for value, _ in found])
        assert match.partner[:, column].tolist() == [partner for _, partner in found]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("parts", [("up", "down"), ("down",)])
def test_cosine(kind: dict, parts: tuple) -> None:
    bank = bank_of(kind)
    similarity = Cosine(parts=parts)
    pairs = [slow.cosine_pairs(bank, DROPPED, expert, parts) for expert in KEPT.tolist()]
    assert_matches(similarity.match(bank, DROPPED, KEPT, LayerStats(0)), list(map(slow.best, pairs)))
    close(similarity.pairs(bank, DROPPED, 3, LayerStats(0)), pairs[1])


@pytest.mark.parametrize("kind", GATED)
@pytest.mark.parametrize("parts", [("up", "down"), ("gate", "up", "down")])
@pytest.mark.parametrize("symmetry", [{"sign": True}, {"balance": True}, {"sign": True, "balance": True}])
def test_cosine_up_to_sign_and_balance(kind: dict, parts: tuple, symmetry: dict) -> None:
    bank = bank_of(kind)
    both = {"sign": False, "balance": False} | symmetry
    similarity = Cosine(parts=parts, **symmetry)
    pairs = [slow.cosine_pairs(bank, DROPPED, expert, parts, **both) for expert in KEPT.tolist()]
    match = similarity.match(bank, DROPPED, KEPT, LayerStats(0))
    assert_matches(match, list(map(slow.best, pairs)))
    close(similarity.pairs(bank, DROPPED, 3, LayerStats(0)), pairs[1])
    for column, expert in enumerate(KEPT.tolist()):
        one, other = slow.parts(bank, DROPPED), slow.parts(bank, expert)
        partners = match.partner[:, column].tolist()
        close(match.scale[:, column], [slow.likest(one[i], other[j], **both) for i, j in enumerate(partners)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1024, 5])
def test_activation_correlation(kind: dict, tokens: int) -> None:
    bank = bank_of(kind)
    stats = random_stats(bank)
    similarity = ActivationCorrelation(tokens=tokens)
    inputs = inputs_of(stats, tokens)
    pairs = [slow.correlation_pairs(bank, DROPPED, expert, inputs) for expert in KEPT.tolist()]
    assert_matches(similarity.match(bank, DROPPED, KEPT, stats), list(map(slow.best, pairs)))
    close(similarity.pairs(bank, DROPPED, 3, stats), pairs[1])
    assert pairs[0][5] == [0.0] * WIDTH, "the case must have a neuron that is constant"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1024, 5])
def test_output_contribution(kind: dict, tokens: int) -> None:
    bank = bank_of(kind)
    stats = random_stats(bank)
    similarity = OutputContribution(tokens=tokens)
    inputs = inputs_of(stats, tokens)
    pairs = [slow.contribution_pairs(bank, DROPPED, expert, inputs) for expert in KEPT.tolist()]
    match = similarity.match(bank, DROPPED, KEPT, stats)
    assert_matches(match, list(map(slow.best, pairs)))
    close(similarity.pairs(bank, DROPPED, 3, stats), pairs[1])
    if bank.gate is None:
        assert match.scale is None
    else:
        one, other = slow.parts(bank, DROPPED), slow.parts(bank, 3)
        expected = [
            slow.likest(one[i], other[j], sign=True, balance=True) for i, j in enumerate(match.partner[:, 1].tolist())
        ]
        close(match.scale[:, 1], expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("base", ["cosine", "activation-correlation", "output-contribution"])
def test_hungarian_is_the_best_of_all_permutations(kind: dict, base: str) -> None:
    bank = random_bank(4, WIDTH, 3, **kind)
    stats = random_stats(bank)
    inputs = inputs_of(stats)
    similarity, formula = {
        "cosine": (Cosine(), lambda *who: slow.cosine_pairs(*who, ("up", "down"))),
        "activation-correlation": (ActivationCorrelation(), lambda *who: slow.correlation_pairs(*who, inputs)),
        "output-contribution": (OutputContribution(), lambda *who: slow.contribution_pairs(*who, inputs)),
    }[base]
    expected = [slow.hungarian(formula(bank, DROPPED, expert)) for expert in KEPT.tolist()]
    assert_matches(Hungarian(base=similarity).match(bank, DROPPED, KEPT, stats), expected)


def assert_whole(match: Match, values: list[float]) -> None:
    close(match.affinity, [values] * WIDTH)
    assert match.partner.tolist() == [[neuron] * len(values) for neuron in range(WIDTH)]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("dead", [None, 0, 1])
def test_expert_output(metric: str, dead: int | None) -> None:
    bank = random_bank(4, WIDTH, 3)
    stats = random_stats(bank)
    routed, sums = stats["routed"].clone(), stats["output_sum"].clone()
    if dead is not None:
        routed[dead], sums[dead] = 0, 0
    stats = replace(stats, values={**stats.values, "routed": routed, "output_sum": sums})
    expected = [
        slow.output_likeness(sums.tolist(), routed.tolist(), DROPPED, expert, metric) for expert in KEPT.tolist()
    ]
    assert_whole(ExpertOutput(metric=metric).match(bank, DROPPED, KEPT, stats), expected)
    assert (0.0 in expected) == (dead is not None)


@pytest.mark.parametrize("metric", ["cosine", "pearson"])
def test_router_logits(metric: str) -> None:
    bank = random_bank(4, WIDTH, 3)
    bank.router[0] = 0
    stats = random_stats(bank)
    expected = [slow.logit_likeness(bank, DROPPED, expert, inputs_of(stats), metric) for expert in KEPT.tolist()]
    assert_whole(RouterLogits(metric=metric).match(bank, DROPPED, KEPT, stats), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_expert_weights(kind: dict) -> None:
    bank = bank_of(kind)
    expected = [slow.weight_likeness(bank, DROPPED, expert) for expert in KEPT.tolist()]
    assert_whole(ExpertWeights().match(bank, DROPPED, KEPT, LayerStats(0)), expected)
