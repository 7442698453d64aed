from dataclasses import replace
from typing import Any

import pytest
import torch

from dernkit.builtin.output_scorers import RankedChoice, Reconstruction
from dernkit.builtin.selectors import BestSubset
from dernkit.errors import CheckpointError
from dernkit.kernel import calls
from dernkit.kernel.outputs import layer_output
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.progress import Silent
from dernkit.stages.calibrate import calibrate_live
from dernkit.testing.banks import copy_expert, permute_experts, permute_stats, random_bank, random_stats, softmax_route
from dernkit.types import ExpertBank, LayerStats
from tests import families

SCORERS = [
    Reconstruction(),
    Reconstruction(order="greedy"),
    Reconstruction(tokens=5),
    RankedChoice(),
    RankedChoice(ballot="first"),
]
FAMILIES = ["mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "llama4_text", "longcat_flash"]
"""Router kinds: softmax over the chosen and over all, sigmoid with groups and a correction bias, a bias of the logits,
coefficients before the experts, identity experts."""


def voters(bank: ExpertBank, preferences: list[list[int]]) -> tuple[ExpertBank, LayerStats]:
    """A router that obeys its inputs: the logits of each token fall in the order of its preferences."""
    experts = bank.dims.experts
    logits = torch.zeros(len(preferences), experts)
    for token, order in enumerate(preferences):
        logits[token, order] = torch.arange(experts, 0, -1, dtype=torch.float32)[: len(order)]
    bank = replace(bank, router=torch.eye(experts), route=softmax_route(torch.eye(experts), bank.dims.top_k))
    return bank, LayerStats(len(preferences), {"sample": logits})


@pytest.mark.parametrize("scorer", SCORERS, ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
def test_scores_follow_the_experts_when_these_are_permuted(scorer: Any, top_k: int) -> None:
    bank, order = random_bank(6, top_k=top_k), torch.tensor([3, 0, 5, 4, 1, 2])
    stats = random_stats(bank, sample=40)
    shuffled = calls.score(scorer, permute_experts(bank, order), permute_stats(stats, order))
    torch.testing.assert_close(shuffled, calls.score(scorer, bank, stats)[order])


@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_scores_are_finite_and_change_nothing(scorer: Any) -> None:
    bank = random_bank(6)
    stats = random_stats(bank)
    tensors = (bank.gate, bank.up, bank.down, bank.router, *stats.values.values())
    before, state = [tensor.clone() for tensor in tensors], torch.get_rng_state()
    first = calls.score(scorer, bank, stats)
    assert torch.equal(calls.score(scorer, bank, stats), first)
    assert all(torch.equal(old, new) for old, new in zip(before, tensors, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_an_expert_that_no_token_chooses_is_no_loss_at_all() -> None:
    bank, stats = voters(random_bank(5, hidden=5), [[0, 2], [2, 3], [3, 0]])
    scores = Reconstruction().score(bank, stats).tolist()
    assert [score == 0 for score in scores] == [False, True, False, False, True]
    greedy = Reconstruction(order="greedy").score(bank, stats).tolist()
    assert greedy[1] == greedy[4] == 0 and min(greedy[0], greedy[2], greedy[3]) > 0


@pytest.fixture
def twins() -> tuple[ExpertBank, LayerStats]:
    """Experts 1 and 3 are the same but for the order of their neurons, to the router too."""
    bank = copy_expert(random_bank(4, top_k=1), 1, 3, torch.arange(7, -1, -1))
    bank.router[3] = bank.router[1]
    return bank, random_stats(bank, sample=64)


def test_an_expert_with_a_twin_is_no_loss(twins: tuple[ExpertBank, LayerStats]) -> None:
    bank, stats = twins
    assert bool((bank.route(stats["sample"]).chosen == 1).any())
    scores = Reconstruction().score(bank, stats)
    assert float(scores[1]) < 1e-12 < 0.1 < float(scores[[0, 2]].min())


def test_leave_one_out_drops_both_twins_and_greedy_only_one(twins: tuple[ExpertBank, LayerStats]) -> None:
    assert set(Reconstruction().score(*twins).argsort()[:2].tolist()) == {1, 3}
    assert Reconstruction(order="greedy").score(*twins).argsort()[:2].tolist() == [3, 0]


@pytest.mark.parametrize("order", ["leave-one-out", "greedy"])
def test_where_the_router_needs_all_experts_all_have_the_same_score(order: str) -> None:
    bank = random_bank(4, groups=2, top_k=2)
    assert Reconstruction(order=order).score(bank, random_stats(bank)).tolist() == [1.0] * 4


def test_votes_of_dropped_experts_go_to_the_next_choice() -> None:
    """By votes alone 0 and 1 would stay; those for 3 go to 2, which then has more than 1."""
    preferences = [[0]] * 5 + [[1, 0]] * 4 + [[2, 3]] * 3 + [[3, 2]] * 2
    bank, stats = voters(random_bank(4, hidden=4, top_k=1), preferences)
    assert RankedChoice().score(bank, stats).tolist() == [3.0, 1.0, 2.0, 0.0]


def test_of_equal_votes_the_one_that_tokens_like_less_goes() -> None:
    """Experts 1, 2 and 4 have no votes; 4 is the second choice of two tokens and 1 the third one of one."""
    bank, stats = voters(random_bank(5, hidden=5, top_k=1), [[3, 4], [3, 4, 1], [0]])
    assert RankedChoice().score(bank, stats).tolist() == [3.0, 1.0, 0.0, 4.0, 2.0]


def test_a_ballot_of_first_choices_counts_no_second_ones() -> None:
    """Everyone's second choice has the most votes of all, and is nobody's first."""
    bank, stats = voters(random_bank(4, hidden=4), [[0, 3], [1, 3], [2, 3]])
    assert RankedChoice().score(bank, stats)[3] == 2
    assert RankedChoice(ballot="first").score(bank, stats)[3] == 0


@pytest.mark.parametrize("component", [*SCORERS, BestSubset()], ids=str)
def test_without_a_router_to_ask_nothing_is_guessed(component: Any) -> None:
    bank = replace(random_bank(layer=2), route=None)
    with pytest.raises(
        CheckpointError,
        match=r"^layer 2: the model's router must be at hand for tokens to be routed again\. Got none instead\. "
        r"Use components that do not route again, such as scorer 'reap'\.$",
    ):
        if isinstance(component, BestSubset):
            component.select(bank, torch.zeros(4, dtype=torch.float64), 2, random_stats(bank))
        else:
            component.score(bank, random_stats(bank))


@pytest.mark.parametrize("on_input", [True, False])
def test_broken_outputs_are_refused(on_input: bool) -> None:
    bank = replace(random_bank(), coefficient_on_input=on_input)
    bank.down[:, 0, 0] = torch.inf
    with pytest.raises(
        CheckpointError,
        match=r"^layer 0: what the experts make of the sampled inputs must be finite\. Got NaN or infinity instead\. "
        r"Check the download of the checkpoint, or repair it\.$",
    ):
        Reconstruction().score(bank, random_stats(bank))


@pytest.mark.parametrize("family", FAMILIES)
def test_reconstruction_is_what_each_familys_own_router_makes_of_it(family: str) -> None:
    model = families.build(family).eval()
    blocks = find_blocks(model, [Universal()])
    ids = [families.inputs(family)["input_ids"]]
    stats = calibrate_live(model, blocks, ids, frozenset({"sample"}), sample_size=64, seed=0, progress=Silent())
    for block in blocks:
        bank, seen = block.bank(), stats[block.layer]
        everyone, inputs = range(bank.dims.experts), seen["sample"]
        whole = layer_output(bank, inputs, bank.route(seen.router_inputs, None)).double()
        for expert, score in enumerate(Reconstruction().score(bank, seen).tolist()):
            others = torch.tensor([other for other in everyone if other != expert])
            part = layer_output(bank, inputs, bank.route(seen.router_inputs, others)).double()
            expected = float((whole - part).square().sum() / whole.square().sum())
            assert score == pytest.approx(expected, rel=1e-3, abs=1e-9)
        assert bool(RankedChoice().score(bank, seen).isfinite().all())
