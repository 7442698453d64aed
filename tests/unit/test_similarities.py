import pytest
import torch

from dernkit.builtin.similarities import Cosine
from dernkit.errors import CheckpointError
from dernkit.testing.banks import copy_expert, random_bank
from dernkit.types import LayerStats

KEPT = torch.tensor([0, 2])
NONE = LayerStats(0)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_permuted_copy_matches_its_twins(gated: bool, bias: bool) -> None:
    order = torch.tensor([2, 0, 1, 4, 3])
    bank = copy_expert(random_bank(3, 5, 4, gated=gated, bias=bias), 2, 1, order)
    match = Cosine().match(bank, 1, KEPT, NONE)
    assert match.affinity.shape == match.partner.shape == (5, 2)
    assert torch.equal(match.affinity[:, 1], torch.ones(5)) and torch.equal(match.partner[:, 1], order)
    assert bool((match.affinity[:, 0] < 1).all())


def test_parts_choose_what_is_compared() -> None:
    bank = random_bank(3, 5, 4)
    bank.up[1] = bank.up[0]
    bank.gate[1] = bank.gate[2]
    assert torch.equal(Cosine(parts=("up",)).match(bank, 1, KEPT, NONE).affinity[:, 0], torch.ones(5))
    assert torch.equal(Cosine(parts=("gate",)).match(bank, 1, KEPT, NONE).affinity[:, 1], torch.ones(5))
    assert bool((Cosine().match(bank, 1, KEPT, NONE).affinity < 1).all())


def test_the_order_of_parts_means_nothing() -> None:
    bank = random_bank(3, 5, 4)
    one, other = (Cosine(parts=parts).match(bank, 1, KEPT, NONE) for parts in (("up", "down"), ("down", "up")))
    assert torch.equal(one.affinity, other.affinity)


def test_gate_needs_a_gate() -> None:
    with pytest.raises(CheckpointError, match=r"'cosine', layer 7: parts must be among up, down .* Got gate instead"):
        Cosine(parts=("gate", "up")).match(random_bank(3, 5, 4, gated=False, layer=7), 1, KEPT, NONE)


@pytest.mark.parametrize("parts", [(), ("up", "up")])
def test_parts_are_not_empty_and_not_repeated(parts: tuple) -> None:
    with pytest.raises(ValueError, match=r"parts: must name each .* Got .* instead\."):
        Cosine(parts=parts)


def test_broken_weights_are_refused() -> None:
    bank = random_bank(3, 5, 4, layer=7)
    bank.down[2, 0, 0] = torch.nan
    with pytest.raises(CheckpointError, match="layer 7, expert 2: weights must be finite"):
        Cosine().match(bank, 1, KEPT, NONE)
