"""Changes of a neuron that its expert does not notice: from the similarity that sees through them to the merge."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dernkit.builtin.activation_similarities import OutputContribution
from dernkit.builtin.assigners import Affinity
from dernkit.builtin.matched import Hungarian
from dernkit.builtin.merges import SphericalKMeans, WeightedAverage
from dernkit.builtin.routers import Slice
from dernkit.builtin.selectors import TopScore
from dernkit.builtin.similarities import Cosine
from dernkit.errors import CheckpointError, ContractError
from dernkit.kernel import calls
from dernkit.kernel.compress import compress_layer
from dernkit.kernel.planning import plan_from_scores
from dernkit.kernel.symmetry import balanced, facing, proportional, rescaled
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.stages.plan import load_plan, save_plan
from dernkit.testing.banks import as_bank, copy_expert, random_bank, random_stats, retained
from dernkit.types import Assignment, ExpertBank, LayerPlan, LayerStats
from tests import families

ORDER = torch.tensor([2, 0, 1, 4, 3])
FACTORS = torch.tensor([-1.0, 4.0, -0.5, 1.0, -3.0])
SCORES = torch.tensor([3.0, 1.0, 2.0], dtype=torch.float64)
SEE_THROUGH = [
    Cosine(sign=True, balance=True),
    Cosine(parts=("gate", "up", "down"), sign=True, balance=True),
    OutputContribution(),
    Hungarian(base=Cosine(sign=True, balance=True)),
    Hungarian(base=OutputContribution()),
]


def changed_twins(bank: ExpertBank, factors: torch.Tensor = FACTORS) -> ExpertBank:
    """Expert 1 becomes a copy of expert 2 with its neurons in another order and (u, d) → (c u, d / c)."""
    bank = copy_expert(bank, 2, 1, ORDER)
    bank.up[1] *= factors[:, None]
    bank.down[1] /= factors
    if bank.up_bias is not None:
        bank.up_bias[1] *= factors
    return bank


def clamped(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As gpt-oss has it."""
    return (up.clamp(-7, 7) + 1) * gate * torch.sigmoid(1.702 * gate)


def plain(gate: None, up: torch.Tensor) -> torch.Tensor:
    return up.relu()


@pytest.mark.parametrize("bias", [True, False])
def test_changed_neurons_are_the_same_function(bias: bool) -> None:
    bank = random_bank(3, 5, 4, bias=bias)
    x = random_stats(bank)["sample"]
    torch.testing.assert_close(changed_twins(bank).output(1, x), bank.output(2, x))


@pytest.mark.parametrize("similarity", SEE_THROUGH, ids=repr)
@pytest.mark.parametrize("bias", [True, False])
def test_a_changed_copy_is_matched_and_the_scale_undoes_the_change(similarity, bias: bool) -> None:
    bank = changed_twins(random_bank(3, 5, 4, bias=bias))
    match = similarity.match(bank, 1, torch.tensor([0, 2]), random_stats(bank))
    torch.testing.assert_close(match.affinity[:, 1], torch.ones(5))
    assert match.partner[:, 1].tolist() == ORDER.tolist()
    torch.testing.assert_close(match.scale[:, 1], 1 / FACTORS)


@pytest.mark.parametrize("similarity", SEE_THROUGH, ids=repr)
@pytest.mark.parametrize("merge", [WeightedAverage(), SphericalKMeans(init="own")], ids=repr)
def test_a_changed_copy_merges_into_the_expert_that_it_is(similarity, merge) -> None:
    bank = changed_twins(random_bank(3, 5, 4, bias=True))
    layer = compress_layer(bank, plan_of(bank, similarity), merge, Slice(), 5, 0)
    x = random_stats(bank)["sample"]
    torch.testing.assert_close(as_bank(layer, bank).output(1, x), bank.output(2, x), rtol=1e-4, atol=1e-4)


def test_signs_alone_are_seen_through_bit_for_bit() -> None:
    signs = FACTORS.sign()
    bank = changed_twins(random_bank(3, 5, 4), signs)
    match = Cosine(sign=True).match(bank, 1, torch.tensor([2]), random_stats(bank))
    assert torch.equal(match.affinity[:, 0], torch.ones(5)) and torch.equal(match.scale[:, 0], signs)


def test_without_the_options_a_changed_copy_is_not_seen_and_nothing_is_scaled() -> None:
    bank = changed_twins(random_bank(3, 5, 4))
    match = Cosine().match(bank, 1, torch.tensor([2]), random_stats(bank))
    assert match.scale is None and bool((match.affinity[FACTORS < 0] < 0.9).all())
    assert Cosine().scale(bank, 1, 2, ORDER, random_stats(bank)) is None


@pytest.mark.parametrize("sign", [True, False])
def test_of_equal_neurons_with_either_sign_the_first_is_the_partner(sign: bool) -> None:
    bank = random_bank(2, 4, 3)
    for neuron, factor in ((0, -1), (2, 1), (3, -1)):
        bank.gate[0, neuron], bank.up[0, neuron] = bank.gate[1, 1], factor * bank.up[1, 1]
        bank.down[0, :, neuron] = factor * bank.down[1, :, 1]
    match = Cosine(sign=sign).match(bank, 1, torch.tensor([0]), random_stats(bank))
    assert (match.affinity[1, 0], match.partner[1, 0]) == (1, 0 if sign else 2)


def test_a_twin_as_it_is_keeps_its_bits() -> None:
    bank = changed_twins(random_bank(3, 5, 4), torch.ones(5))
    assert plan_of(bank, Cosine(sign=True, balance=True)).assignment.scale is None
    segments = bank.segments(1)
    assert torch.equal(facing(segments, segments, sign=True, balance=True), torch.ones(5))
    assert torch.equal(rescaled(segments, torch.ones(5)), segments)


def test_balanced_neurons_have_equal_norms_and_dead_ones_stay() -> None:
    segments = random_bank().segments(0)
    segments[2, 1] = 0
    segments[3, 2] = 0
    even = balanced(segments)
    norms = even.norm(dim=2)
    alive = [0, 1, 4, 5, 6, 7]
    torch.testing.assert_close(norms[alive, 1], norms[alive, 2])
    torch.testing.assert_close(norms.prod(1), segments.norm(dim=2).prod(1))
    assert torch.equal(even[2:4], segments[2:4]) and torch.equal(even[:, 0], segments[:, 0])


def test_what_the_activation_allows_is_found_by_trying() -> None:
    gated, ungated = random_bank(), random_bank(gated=False)
    found = {
        "silu gate": gated,
        "clamp and offset": replace(gated, act=clamped),
        "silu": ungated,
        "relu": replace(ungated, act=plain),
    }
    allowed = {name: (proportional(bank, -1.0), proportional(bank, 3.0)) for name, bank in found.items()}
    assert allowed == {
        "silu gate": (True, True),
        "clamp and offset": (False, False),
        "silu": (False, False),
        "relu": (False, True),
    }


@pytest.mark.parametrize(
    ("family", "sign", "balance"),
    [
        ("mixtral", True, True),
        ("gpt_oss", False, False),
        ("deepseek_v4", True, False),
        ("nemotron_h", False, False),
    ],
)
def test_what_families_allow(family: str, sign: bool, balance: bool) -> None:
    bank = find_blocks(families.build(family), [Universal()])[0].bank()
    assert (proportional(bank, -1.0), proportional(bank, 3.0)) == (sign, balance)


@pytest.mark.parametrize(("gated", "act", "option"), [(True, clamped, "sign"), (False, plain, "sign")])
def test_options_are_refused_where_the_activation_does_not_allow_them(gated: bool, act, option: str) -> None:
    bank = replace(random_bank(gated=gated, layer=7), act=act)
    with pytest.raises(CheckpointError, match=rf"'cosine', layer 7: {option} must be false where .* Got experts whose"):
        Cosine(**{option: True}).match(bank, 1, torch.tensor([0]), random_stats(bank))


def test_balance_works_without_a_gate_where_the_activation_allows_it() -> None:
    bank = replace(changed_twins(random_bank(3, 5, 4, gated=False), FACTORS.abs()), act=plain)
    match = Cosine(balance=True).match(bank, 1, torch.tensor([2]), random_stats(bank))
    torch.testing.assert_close(match.affinity[:, 0], torch.ones(5))
    torch.testing.assert_close(match.scale[:, 0], 1 / FACTORS.abs())


@pytest.mark.parametrize("option", ["sign", "balance"])
@pytest.mark.parametrize("parts", [("up",), ("gate", "down")])
def test_options_need_the_parts_that_they_change(option: str, parts: tuple) -> None:
    with pytest.raises(ValueError, match=r"parts: must have both up and down .* Got .* instead\."):
        Cosine(parts=parts, **{option: True})


def test_a_plan_keeps_its_scales(tmp_path: Path) -> None:
    bank = changed_twins(random_bank(3, 5, 4))
    plans = [plan_of(bank, Cosine(sign=True, balance=True)), plan_of(replace_layer(bank, 1), Cosine())]
    save_plan(plans, tmp_path, {"key": "k"}, {})
    loaded = load_plan(tmp_path)
    assert torch.equal(loaded[0].assignment.scale, plans[0].assignment.scale)
    assert loaded[1].assignment.scale is None


@pytest.mark.parametrize(("scale", "law"), [(torch.zeros(1), "in_range"), (torch.tensor([torch.inf]), "finite")])
def test_scales_of_an_assigner_are_held_to_their_contract(scale: torch.Tensor, law: str) -> None:
    class Scaling:
        name = "scaling"
        requires = frozenset()
        needs_groups = False

        def assign(self, bank, retention, stats) -> Assignment:
            one = torch.tensor([5])
            return Assignment(one, one * 0, one * 0, torch.ones(1), scale)

    bank = random_bank(3, 5, 4, layer=7)
    with pytest.raises(ContractError, match=rf"^assigner 'scaling', layer 7: scale must .*law {law}\)"):
        calls.assign(Scaling(), bank, retained(bank, [0, 2]), LayerStats(0))


def plan_of(bank: ExpertBank, similarity) -> LayerPlan:
    """Experts 0 and 2 stay, all of expert 1 moves."""
    assigner = Affinity(similarity=similarity, quantile=1.0)
    return plan_from_scores(bank, random_stats(bank), SCORES, 2, TopScore(), assigner)


def replace_layer(bank: ExpertBank, layer: int) -> ExpertBank:
    return replace(bank, dims=replace(bank.dims, layer=layer))
