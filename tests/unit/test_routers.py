from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dernkit.builtin.merges import Keep
from dernkit.builtin.routers import Additive, Average, LogMass, Slice
from dernkit.errors import CheckpointError
from dernkit.kernel.compress import NO_STATISTICS, compress_layer
from dernkit.kernel.ridge import ridge_fit
from dernkit.testing.banks import permute_experts, permute_stats, random_bank, random_stats
from dernkit.types import Assignment, ExpertBank, LayerPlan, LayerStats, Routing

BANK = random_bank(4, 5, 6)
STATS = random_stats(BANK)
ROWS = BANK.router
KEPT = torch.tensor([1, 2])
ROUTERS = [
    Slice(),
    Additive(),
    Average(),
    Average(weights="uniform"),
    Average(weights="frequency"),
    LogMass(),
    LogMass(ridge=1e-6),
]
every_router = pytest.mark.parametrize("router", ROUTERS, ids=repr)


def plan(source: list[int], target: list[int], scores: list[float] | None = None) -> LayerPlan:
    index = torch.tensor(source, dtype=torch.int64)
    moves = Assignment(index, torch.tensor(target, dtype=torch.int64), index % 5, torch.ones(len(source)))
    return LayerPlan(0, 4, 5, torch.tensor(scores or [1.0] * 4, dtype=torch.float64), KEPT, moves)


def expert_moves(*pairs: tuple[int, int], scores: list[float] | None = None) -> LayerPlan:
    """Whole experts (index, target)."""
    source = [expert * 5 + neuron for expert, _ in pairs for neuron in range(5)]
    return plan(source, [target for _, target in pairs for _ in range(5)], scores)


def test_slice_keeps_rows() -> None:
    assert torch.equal(Slice().update(ROWS, plan([0], [0]), NO_STATISTICS), ROWS[KEPT])


def test_additive_adds_the_share_of_moved_segments_of_the_original_rows() -> None:
    new = Additive().update(ROWS, plan([0, 1, 15, 16, 17], [0, 0, 0, 0, 0]), NO_STATISTICS)
    torch.testing.assert_close(new[0], ROWS[1] + 2 / 5 * ROWS[0] + 3 / 5 * ROWS[3])


@every_router
@pytest.mark.parametrize("is_biased", [True, False])
def test_rows_without_arrivals_keep_their_bits_and_nothing_is_mutated(router: object, is_biased: bool) -> None:
    before, seen = ROWS.clone(), {name: value.clone() for name, value in STATS.values.items()}
    told = replace(plan([0], [0]), biased_rows=is_biased)
    new = router.update(ROWS, told, STATS)
    assert new.shape == (2, 6) and new.dtype == torch.float32
    assert torch.equal(new[1], ROWS[2])
    assert torch.equal(new[0], ROWS[1]) == isinstance(router, Slice)
    assert torch.equal(router.update(ROWS, replace(plan([], []), biased_rows=is_biased), STATS), ROWS[KEPT])
    assert torch.equal(ROWS, before)
    assert all(torch.equal(value, seen[name]) for name, value in STATS.values.items())
    assert torch.equal(new, router.update(ROWS, told, STATS))


@every_router
@pytest.mark.parametrize("is_biased", [True, False])
def test_experts_that_saw_no_token_and_scores_of_0_give_finite_rows(router: object, is_biased: bool) -> None:
    dead = LayerStats(0, {name: value * 0 for name, value in STATS.values.items()}, STATS.sample_size)
    told = replace(expert_moves((0, 0), (3, 0), scores=[0.0] * 4), biased_rows=is_biased)
    assert bool(router.update(ROWS, told, dead).isfinite().all())
    one = replace(STATS, values={**STATS.values, "gate_sum": torch.tensor([5.0, 0.0, 0.0, 3.0])})
    assert bool(router.update(ROWS, told, one).isfinite().all())


@every_router
@pytest.mark.parametrize("is_biased", [True, False])
def test_the_order_of_moves_and_of_experts_means_nothing(router: object, is_biased: bool) -> None:
    source, target = [0, 1, 2, 15, 16, 18, 19], [0, 0, 1, 1, 1, 0, 0]
    told = replace(plan(source, target, [0.2, 0.5, 0.1, 0.7]), biased_rows=is_biased)
    new = router.update(ROWS, told, STATS)
    backwards = replace(plan(source[::-1], target[::-1], [0.2, 0.5, 0.1, 0.7]), biased_rows=is_biased)
    assert torch.equal(router.update(ROWS, backwards, STATS), new)
    order = torch.tensor([2, 3, 0, 1])
    moved = torch.tensor(source)
    there = torch.argsort(order)[moved // 5] * 5 + moved % 5
    shuffled = replace(plan(there.tolist(), target), biased_rows=is_biased, scores=told.scores[order])
    shuffled = replace(shuffled, kept=torch.argsort(order)[KEPT])
    torch.testing.assert_close(
        router.update(permute_experts(BANK, order).router, shuffled, permute_stats(STATS, order)), new
    )


def test_average_by_hand() -> None:
    new = Average().update(ROWS, plan([0, 1, 15, 16, 17], [0] * 5, [1.0, 3.0, 0.0, 0.5]), NO_STATISTICS)
    torch.testing.assert_close(new[0], (3 * ROWS[1] + 0.4 * ROWS[0] + 0.3 * ROWS[3]) / 3.7)
    stats = LayerStats(10, {"routed": torch.tensor([2.0, 4.0, 1.0, 6.0], dtype=torch.float64)})
    new = Average(weights="frequency").update(ROWS, expert_moves((0, 0), (3, 0)), stats)
    torch.testing.assert_close(new[0], (4 * ROWS[1] + 2 * ROWS[0] + 6 * ROWS[3]) / 12)


@pytest.mark.parametrize("weights", ["score", "uniform", "frequency"])
def test_the_average_of_a_row_with_itself_is_that_row_bit_for_bit(weights: str) -> None:
    rows = ROWS[[1, 1, 2, 1]]
    scores = [0.1, 0.7, 0.2, 0.3]
    new = Average(weights=weights).update(rows, expert_moves((0, 0), (3, 0), scores=scores), STATS)
    assert torch.equal(new, rows[KEPT])


def test_log_mass_keeps_the_probability_of_a_group_where_a_row_can() -> None:
    """The last input is 1 for all tokens, and within a group logits differ by a constant."""
    inputs = torch.cat([torch.randn(50, 5, generator=torch.Generator().manual_seed(1)), torch.ones(50, 1)], dim=1)
    rows = ROWS.clone()
    rows[[0, 3]] = rows[1].clone()
    rows[0, -1] += 1.3
    rows[3, -1] -= 0.4
    stats = replace(STATS, values={**STATS.values, "sample": inputs})
    moves = expert_moves((0, 0), (3, 0))
    before = (inputs @ rows.T).softmax(1)
    after = (inputs @ LogMass(ridge=1e-6).update(rows, moves, stats).T).softmax(1)
    torch.testing.assert_close(after[:, 0], before[:, [0, 1, 3]].sum(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(after[:, 1], before[:, 2], rtol=1e-4, atol=1e-5)
    sliced = (inputs @ rows[KEPT].T).softmax(1)
    assert float((sliced[:, 0] - before[:, [0, 1, 3]].sum(1)).abs().max()) > 0.1


def test_log_mass_comes_closer_to_the_probability_of_groups_than_other_routers() -> None:
    inputs = torch.randn(400, 6, generator=torch.Generator().manual_seed(1)) + 0.7
    stats = replace(STATS, values={**STATS.values, "sample": inputs})
    moves = expert_moves((0, 0), (3, 1))
    wanted = (inputs @ ROWS.T).softmax(1) @ torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])

    def error(router: object) -> float:
        return float(((inputs @ router.update(ROWS, moves, stats).T).softmax(1) - wanted).square().mean())

    others = [error(router) for router in (Slice(), Additive(), Average())]
    assert error(LogMass()) < min(others) / 1.2


def test_log_mass_raises_nothing_but_the_bias_where_the_family_has_one() -> None:
    stats = replace(STATS, values={**STATS.values, "gate_sum": torch.tensor([30.0, 20.0, 40.0, 10.0])})
    moves = replace(plan([0, 1, 15, 16, 17, 18, 19], [0] * 7), biased_rows=True)
    new = LogMass().update(ROWS, moves, stats)
    assert torch.equal(new[:, :-1], ROWS[KEPT][:, :-1])
    torch.testing.assert_close(new[0, -1] - ROWS[1, -1], torch.tensor((20 + 0.4 * 30 + 10) / 20).log())


def with_logit_bias(bank: ExpertBank) -> ExpertBank:
    bias = torch.linspace(-1, 1, bank.dims.experts).to(bank.router)
    return replace(bank, per_expert={"router.bias": bias, **bank.per_expert}, router_bias="router.bias")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_tells_routers_whether_rows_carry_a_bias(dtype: torch.dtype) -> None:
    bank, moves = random_bank(4, 5, 6, dtype=dtype), expert_moves((0, 0))
    plain = compress_layer(bank, moves, Keep(), LogMass(), 5, 0, STATS)
    assert not torch.equal(plain.router[0], bank.router[1]) and torch.equal(plain.router[1], bank.router[2])
    biased = with_logit_bias(bank)
    out = compress_layer(biased, moves, Keep(), LogMass(), 5, 0, STATS)
    assert torch.equal(out.router, bank.router[KEPT])
    bias, before = out.per_expert["router.bias"], biased.per_expert["router.bias"]
    assert bias[0] > before[1] and torch.equal(bias[1], before[2]) and bias.dtype == dtype
    assert torch.equal(out.per_expert["correction_bias"], bank.per_expert["correction_bias"][KEPT])


def test_rows_are_fitted_to_what_they_are_multiplied_with_not_to_what_the_router_is_called_with() -> None:
    """As in Gemma 4, whose router normalises its inputs."""

    def route(inputs: torch.Tensor, experts: torch.Tensor | None) -> Routing:
        found = BANK.route(torch.nn.functional.rms_norm(inputs, (6,)), experts)
        assert found.features is not None
        return found

    moves = expert_moves((0, 0))
    normed = torch.nn.functional.rms_norm(STATS["sample"], (6,))
    expected = LogMass().update(ROWS, moves, replace(STATS, values={**STATS.values, "sample": normed}))
    out = compress_layer(replace(BANK, route=route), moves, Keep(), LogMass(), 5, 0, STATS)
    assert torch.equal(out.router, expected)


@pytest.mark.parametrize(
    "route", [None, lambda inputs, experts: replace(BANK.route(inputs, experts), features=None)], ids=["none", "blind"]
)
def test_log_mass_needs_to_see_what_rows_are_multiplied_with(route: Callable | None) -> None:
    bank = replace(BANK, route=route)
    with pytest.raises(CheckpointError, match=r"^router 'log-mass', layer 0: the adapter must tell .* Got none .* Use"):
        compress_layer(bank, expert_moves((0, 0)), Keep(), LogMass(), 5, 0, STATS)
    out = compress_layer(bank, expert_moves((0, 0)), Keep(), Average(), 5, 0, STATS)
    assert out.router.shape == (2, 6)


def test_log_mass_without_its_statistics_says_which_are_missing() -> None:
    with pytest.raises(CheckpointError, match=r"^router 'log-mass', layer 0: statistics must hold gate_sum, sample,"):
        compress_layer(BANK, expert_moves((0, 0)), Keep(), LogMass(), 5, 0)


def test_log_mass_refuses_inputs_that_do_not_fit_to_rows() -> None:
    stats = replace(STATS, values={**STATS.values, "sample": torch.ones(3, 8)})
    with pytest.raises(CheckpointError, match=r"log-mass', layer 0: rows must be as wide .*, 8 features. Got 6 .* Use"):
        LogMass().update(ROWS, expert_moves((0, 0)), stats)


def test_both_forms_of_the_ridge_fit_agree_and_no_input_gives_no_change() -> None:
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(7, 7, generator=rng), torch.randn(7, 2, generator=rng, dtype=torch.float64)
    wide = torch.cat([x, torch.zeros(7, 1)], dim=1)  # one feature more, no other fit: the form for few inputs
    tall = torch.cat([x, torch.zeros(1, 7)]), torch.cat([y, torch.zeros(1, 2)])
    torch.testing.assert_close(ridge_fit(wide, y, 0.3)[:, :7], ridge_fit(*tall, 0.3))
    assert not ridge_fit(x * 0, y, 0.1).any()
    torch.testing.assert_close(ridge_fit(x * 100, y, 0.3) * 100, ridge_fit(x, y, 0.3))


def test_statistics_that_routers_ask_for() -> None:
    assert Average().requires == Average(weights="uniform").requires == frozenset()
    assert Average(weights="frequency").requires == {"routed"}
    assert LogMass.requires == {"gate_sum", "sample"}
