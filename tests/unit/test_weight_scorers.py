from dataclasses import replace
from typing import Any

import pytest
import torch

from dernkit.builtin.weight_scorers import Aimer, WeightNorm
from dernkit.errors import CheckpointError
from dernkit.testing.banks import permute_experts, permute_neurons, random_bank
from dernkit.types import ExpertBank, LayerStats

SCORERS = [WeightNorm(), WeightNorm(parts=("down",)), Aimer()]
NONE = LayerStats(0)


def scaled(bank: ExpertBank, factor: float) -> ExpertBank:
    return replace(bank, gate=bank.gate * factor, up=bank.up * factor, down=bank.down * factor)


@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_nothing_is_calibrated(scorer: Any) -> None:
    assert scorer.requires == frozenset()
    assert bool(scorer.score(random_bank(), NONE).isfinite().all())


@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_scores_follow_the_experts_and_not_their_neurons(scorer: Any) -> None:
    bank, order = random_bank(5, bias=True), torch.tensor([3, 0, 4, 1, 2])
    scores = scorer.score(bank, NONE)
    assert torch.equal(scorer.score(permute_experts(bank, order), NONE), scores[order])
    torch.testing.assert_close(scorer.score(permute_neurons(bank, 2, torch.randperm(8)), NONE), scores)


@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_biases_do_not_count(scorer: Any) -> None:
    with_bias = random_bank(bias=True)
    without = replace(with_bias, gate_bias=None, up_bias=None, down_bias=None)
    assert torch.equal(scorer.score(with_bias, NONE), scorer.score(without, NONE))


def test_only_the_norm_follows_the_scale_of_the_weights() -> None:
    bank = random_bank()
    larger = scaled(bank, 4)
    assert torch.equal(WeightNorm().score(larger, NONE), 4 * WeightNorm().score(bank, NONE))
    torch.testing.assert_close(Aimer().score(larger, NONE), Aimer().score(bank, NONE))


def test_aimer_is_0_for_even_weights_and_rises_with_their_concentration() -> None:
    bank = random_bank(4, 16, 32, seed=1)
    for tensor in (bank.gate, bank.up, bank.down):
        tensor[0] = tensor[0].sign() / 4
        tensor[1] = tensor[1] ** 3
        tensor[2] = 0
    even, cubes, zeros, gaussian = Aimer().score(bank, NONE).tolist()
    assert (even, zeros) == (0.0, 0.0)
    assert cubes > 0.4 and abs(gaussian - 0.2) < 0.02


@pytest.mark.parametrize("parts", [(), ("up", "up")])
def test_parts_are_named_once(parts: tuple) -> None:
    with pytest.raises(ValueError, match=r"^parts: must name each .* Got \(.*\) instead\. Remove what is repeated\.$"):
        WeightNorm(parts=parts)


def test_parts_that_the_experts_do_not_have_are_refused() -> None:
    bank = random_bank(gated=False, layer=3)
    with pytest.raises(
        CheckpointError,
        match=r"^scorer 'weight-norm', layer 3: parts must be among up, down for experts without a gate\. "
        r"Got gate instead\. Take it out of `parts`\.$",
    ):
        WeightNorm(parts=("gate", "down")).score(bank, NONE)


@pytest.mark.parametrize("scorer", SCORERS, ids=str)
def test_broken_weights_are_refused(scorer: Any) -> None:
    bank = random_bank()
    bank.down[1, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match=r"^layer 0, expert 1: weights must be finite"):
        scorer.score(bank, NONE)
