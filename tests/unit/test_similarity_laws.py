"""Laws of all similarities: copies are found, the order of experts and neurons means nothing."""

from dataclasses import replace

import pytest
import torch

from dernkit.builtin.activation_similarities import ActivationCorrelation, OutputContribution
from dernkit.builtin.expert_similarities import ExpertOutput, ExpertWeights, RouterLogits
from dernkit.builtin.matched import Hungarian
from dernkit.builtin.similarities import Cosine
from dernkit.testing.banks import (
    copy_expert,
    permute_experts,
    permute_neurons,
    permute_stats,
    random_bank,
    random_stats,
)
from dernkit.types import ExpertBank, LayerStats

NEURONS = [
    Cosine(),
    ActivationCorrelation(),
    OutputContribution(),
    Hungarian(),
    Hungarian(base=ActivationCorrelation()),
    Hungarian(base=OutputContribution()),
]
GATED_NEURONS = [Cosine(sign=True, balance=True), Hungarian(base=Cosine(sign=True))]
EXPERTS = [
    ExpertOutput(),
    ExpertOutput(metric="euclidean"),
    RouterLogits(),
    RouterLogits(metric="pearson"),
    ExpertWeights(),
]
ORDER = torch.tensor([3, 0, 2, 1])
KEPT = torch.tensor([0, 2])
KINDS = [(True, True), (True, False), (False, True), (False, False)]


def dead(bank: ExpertBank, sample: int = 0) -> LayerStats:
    """Statistics of a layer that saw no token."""
    stats = random_stats(bank)
    gone = {name: value[:sample] if name.startswith("sample") else value * 0 for name, value in stats.values.items()}
    return replace(stats, tokens=0, values=gone)


@pytest.mark.parametrize(("gated", "bias"), KINDS)
@pytest.mark.parametrize("similarity", NEURONS, ids=repr)
def test_a_permuted_copy_is_matched_one_to_one_with_affinity_1(similarity, gated: bool, bias: bool) -> None:
    order = torch.randperm(32, generator=torch.Generator().manual_seed(1))
    bank = copy_expert(random_bank(3, 32, 8, gated=gated, bias=bias), 2, 1, order)
    match = similarity.match(bank, 1, KEPT, random_stats(bank, sample=64))
    assert torch.equal(match.affinity[:, 1], torch.ones(32)) and torch.equal(match.partner[:, 1], order)
    assert bool((match.affinity[:, 0] < 1).all())


@pytest.mark.parametrize("similarity", NEURONS + GATED_NEURONS + EXPERTS, ids=repr)
def test_the_order_of_experts_means_nothing(similarity) -> None:
    bank = random_bank(4, 9, 5)
    stats = random_stats(bank)
    moved, moved_stats = permute_experts(bank, ORDER), permute_stats(stats, ORDER)
    one = similarity.match(bank, 3, torch.tensor([2, 1]), stats)
    other = similarity.match(moved, 0, torch.tensor([2, 3]), moved_stats)
    torch.testing.assert_close(other.affinity, one.affinity)
    assert torch.equal(other.partner, one.partner)


@pytest.mark.parametrize("similarity", NEURONS + GATED_NEURONS, ids=repr)
def test_the_order_of_neurons_means_nothing(similarity) -> None:
    bank = random_bank(3, 9, 5)
    stats = random_stats(bank)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    one = similarity.match(bank, 1, KEPT, stats)
    other = similarity.match(permute_neurons(bank, 1, order), 1, KEPT, stats)
    torch.testing.assert_close(other.affinity, one.affinity[order])
    assert torch.equal(other.partner, one.partner[order])
    other = similarity.match(permute_neurons(bank, 2, order), 1, KEPT, stats)
    torch.testing.assert_close(other.affinity, one.affinity)
    assert torch.equal(order[other.partner[:, 1]], one.partner[:, 1])


@pytest.mark.parametrize("similarity", EXPERTS[:4], ids=repr)
def test_the_order_of_neurons_means_nothing_to_what_experts_do(similarity) -> None:
    bank = random_bank(3, 9, 5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    one = similarity.match(bank, 1, KEPT, random_stats(bank))
    other = similarity.match(permute_neurons(bank, 1, order), 1, KEPT, random_stats(bank))
    assert torch.equal(other.affinity, one.affinity)


@pytest.mark.parametrize("similarity", NEURONS + GATED_NEURONS + EXPERTS, ids=repr)
@pytest.mark.parametrize("sample", [0, 1])
def test_a_layer_without_tokens_gives_finite_affinities(similarity, sample: int) -> None:
    bank = random_bank(3, 9, 5)
    match = similarity.match(bank, 1, KEPT, dead(bank, sample))
    assert match.affinity.shape == match.partner.shape == (9, 2)
    assert bool(match.affinity.isfinite().all()) and match.partner.dtype == torch.int64
    if isinstance(similarity, ActivationCorrelation | ExpertOutput):
        assert not match.affinity.any()


@pytest.mark.parametrize("similarity", NEURONS + GATED_NEURONS + EXPERTS, ids=repr)
def test_affinities_of_half_precision_experts_are_float32(similarity) -> None:
    bank = random_bank(3, 9, 5, dtype=torch.bfloat16)
    assert similarity.match(bank, 1, KEPT, random_stats(bank)).affinity.dtype == torch.float32


@pytest.mark.parametrize("similarity", NEURONS[:3] + GATED_NEURONS[:1], ids=repr)
def test_the_best_of_all_pairs_is_the_match(similarity) -> None:
    bank = random_bank(3, 9, 5)
    stats = random_stats(bank)
    pairs = similarity.pairs(bank, 1, 2, stats)
    match = similarity.match(bank, 1, KEPT, stats)
    assert pairs.dtype == torch.float32 and pairs.shape == (9, 9)
    torch.testing.assert_close(pairs.amax(1), match.affinity[:, 1])
    assert torch.equal(pairs.argmax(1), match.partner[:, 1])
