"""Selection and refit in function space against loops in float64, and what must hold exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dernkit.builtin.function_space import FunctionSpace
from dernkit.builtin.merges import Adopt
from dernkit.builtin.refits import LeastSquares
from dernkit.builtin.routers import Slice
from dernkit.errors import CheckpointError, RecipeError
from dernkit.kernel import calls, least_squares
from dernkit.kernel.after import after_surgery
from dernkit.kernel.compress import compress_layer, target_width
from dernkit.kernel.function_space import features, saliency, select, turns
from dernkit.kernel.layer_error import layer_error
from dernkit.kernel.least_squares import ByTokens, System, by_part, chosen_ridge, damping, equations, parts, total
from dernkit.testing.banks import copy_expert, random_bank, retained
from dernkit.testing.cases import statistics
from dernkit.types import ExpertBank, LayerPlan, LayerStats
from tests.reference import function_space as reference

KEPT = [0, 2]


def layer(**options: object) -> tuple[ExpertBank, LayerStats]:
    bank = random_bank(4, 5, 4, **options)  # type: ignore[arg-type]
    return bank, statistics(bank)


def first(stats: LayerStats, count: int) -> LayerStats:
    """With the beginning of the sample only."""
    few = {name: value[:count] if name.startswith("sample") else value for name, value in stats.values.items()}
    return replace(stats, values=few)


def plan_with(bank: ExpertBank, stats: LayerStats, how: FunctionSpace) -> LayerPlan:
    retention = retained(bank, KEPT)
    moves = calls.assign(how, bank, retention, stats)
    return LayerPlan(0, bank.dims.experts, bank.dims.width, retention.scores, retention.kept, moves)


def error(bank: ExpertBank, stats: LayerStats, plan: LayerPlan, refit: LeastSquares | None, width: int) -> float:
    made = compress_layer(bank, plan, Adopt(), Slice(), width, 0, stats, refit)
    found = layer_error(bank, made, plan.kept, stats)
    assert found is not None
    return found


@pytest.mark.parametrize("options", [{}, {"gated": False, "bias": True}], ids=["gated", "biases"])
def test_features_and_their_gram_matrix(options: dict[str, bool]) -> None:
    bank, stats = layer(**options)
    assert bank.route is not None
    expert, rows, coefficients = turns(bank.route(stats.router_inputs), [1])[0]
    found = features(bank, bank.segments(expert), stats["sample"][rows], coefficients)
    wanted = torch.randn(len(rows), 3, generator=torch.Generator().manual_seed(1))
    expected = [
        [float(c) * reference.activation(bank, segment, stats["sample"][row]) for segment in bank.segments(expert)]
        for row, c in zip(rows.tolist(), coefficients, strict=True)
    ]
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-5)
    got = equations(found, wanted)
    gram, right = reference.gram_and_right(expected, wanted.tolist())
    torch.testing.assert_close(got.gram, gram, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.right, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("make", [equations, ByTokens], ids=["by neurons", "by tokens"])
@pytest.mark.parametrize(("tokens", "rounds"), [(40, 1), (40, 2), (40, 5), (8, 2)])
def test_saliency_is_what_the_error_rises_by_and_selection_follows_it(
    make: Callable[[Tensor, Tensor], System], tokens: int, rounds: int
) -> None:
    rng = torch.Generator().manual_seed(rounds)
    hidden, wanted = torch.randn(tokens, 11, generator=rng), torch.randn(tokens, 3, generator=rng)
    whole = make(hidden, wanted)
    gram, right = hidden.double().T @ hidden.double(), hidden.double().T @ wanted.double()
    ridge = damping(whole, 0.01)
    assert ridge == pytest.approx(0.01 * float(gram.diagonal().mean()), rel=1e-6)
    expected = torch.tensor(reference.saliencies(gram, right, ridge, range(11)), dtype=torch.float64)
    torch.testing.assert_close(saliency(whole, ridge), expected, rtol=1e-4, atol=1e-5)
    chosen, found = select(whole, ridge, 4, rounds)
    assert chosen.tolist() == reference.eliminate(gram, right, ridge, 4, rounds)
    left = torch.tensor(reference.saliencies(gram, right, ridge, chosen.tolist()), dtype=torch.float64)
    torch.testing.assert_close(found, left, rtol=1e-4, atol=1e-5)


def test_fewer_tokens_than_neurons_have_the_same_solution() -> None:
    rng = torch.Generator().manual_seed(5)
    hidden, wanted = torch.randn(20, 30, generator=rng), torch.randn(20, 3, generator=rng)
    part = torch.arange(20) % 2
    found, expected = (
        by_part(hidden, wanted, part, 2),
        [equations(hidden[part == i], wanted[part == i]) for i in (0, 1)],
    )
    assert all(isinstance(each, ByTokens) for each in found)
    some, ridge = torch.tensor([3, 4, 17]), damping(total(found), 0.1)
    for dual, primal in (
        (found[0], expected[0]),
        (total(found), total(expected)),
        (found[1].of(some), expected[1].of(some)),
    ):
        weights = primal.solve(ridge)
        torch.testing.assert_close(dual.solve(ridge), weights, rtol=1e-4, atol=1e-5)
        assert dual.error(weights) == pytest.approx(primal.error(weights), rel=1e-4)
        torch.testing.assert_close(dual.squares(), primal.squares(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        found[0].products(some, some).double(), expected[0].products(some, some), rtol=1e-4, atol=1e-5
    )
    assert chosen_ridge(found, (0.01, 1.0)) == chosen_ridge(expected, (0.01, 1.0))


def test_what_float32_cannot_solve_is_solved_in_float64_and_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(least_squares, "_EXACT", 8)
    same = equations(torch.ones(16, 12), torch.ones(16, 1))
    weights = same.solve(1e-7)
    torch.testing.assert_close(weights, torch.full((12, 1), 1 / 12, dtype=torch.float64), rtol=1e-4, atol=0)
    assert "12 equations with λ = 1e-07 are not positive definite in float32" in caplog.text
    with pytest.raises(CheckpointError, match="must be positive definite"):
        same.solve(-1.0)


@pytest.mark.parametrize("noise", [0.1, 3.0, 100.0])
def test_the_ridge_is_the_one_that_does_best_on_what_is_left_out(noise: float) -> None:
    rng = torch.Generator().manual_seed(int(noise))
    hidden, part = torch.randn(60, 7, generator=rng), torch.randint(3, (60,), generator=rng)
    wanted = hidden @ torch.randn(7, 2, generator=rng) + noise * torch.randn(60, 2, generator=rng)
    ridges = (0.001, 0.1, 1.0, 10.0)
    errors = reference.left_out_errors(hidden, wanted, part.tolist(), ridges)
    best = min(errors, key=lambda ridge: errors[ridge])
    none = float(wanted.double().square().sum())
    assert chosen_ridge(by_part(hidden, wanted, part, 3), ridges) == (best if errors[best] < none else None)


def test_parts_are_consecutive_text() -> None:
    stats = LayerStats(10, {"sample": torch.zeros(4, 2), "sample_token": torch.tensor([9, 0, 4, 5])})
    assert parts(stats, 2).tolist() == [1, 0, 0, 1]
    assert parts(stats, 5).tolist() == [4, 0, 2, 2]


def test_what_gains_nothing_on_other_text_stays_as_it_is() -> None:
    """The first half of the text is one token over and over: what is chosen on it is good for nothing else."""
    moved = {1: 0, 2: 0}
    for seed in range(6):
        bank, stats = layer(seed=seed)
        sample = torch.cat([stats["sample"][:1].expand(10, -1), stats["sample"][10:20]])
        both = {"sample": sample, "sample_key": torch.arange(20), "sample_token": torch.arange(20)}
        for halves in moved:
            moved[halves] += len(plan_with(bank, LayerStats(20, both), FunctionSpace(parts=halves)).assignment)
    assert moved[2] < moved[1]


def test_the_refit_is_where_no_change_of_a_projection_lowers_its_objective() -> None:
    bank, stats = layer()
    stats = first(stats, 20)
    plan = plan_with(bank, stats, FunctionSpace())
    made = compress_layer(bank, plan, Adopt(), Slice(), bank.dims.width, 0, stats)
    after = after_surgery(made, bank, plan.kept)
    assert bank.route is not None and after.route is not None
    before, now = bank.route(stats.router_inputs), after.route(stats.router_inputs)
    down = LeastSquares(ridge=0.01, passes=60).refit(bank, after, plan, stats)

    def objective(projections: torch.Tensor) -> float:
        return reference.objective(bank, after, stats["sample"], before, now, projections, 0.01)

    best = objective(down)
    assert best < objective(after.down)
    rng = torch.Generator().manual_seed(2)
    for size in (0.3, 0.01):
        for _ in range(4):
            assert objective(down + size * torch.randn(down.shape, generator=rng)) > best * (1 - 1e-6)


def test_with_room_for_the_whole_pool_the_layer_gives_what_it_gave() -> None:
    """With fewer tokens than neurons: the pool of one expert cannot be several experts for all tokens there are."""
    bank, stats = layer(top_k=1)
    stats = first(stats, 10)
    everything = replace(plan_with(bank, stats, FunctionSpace()).assignment, left=torch.empty(0, dtype=torch.int64))
    source = torch.cat([torch.arange(5) + 5, torch.arange(5) + 15]).repeat(2)
    moves = replace(
        everything,
        source=source,
        target=torch.tensor([0] * 10 + [1] * 10),
        partner=torch.zeros(20, dtype=torch.int64),
        affinity=torch.ones(20),
    )
    plan = LayerPlan(0, 4, 5, retained(bank, KEPT).scores, torch.tensor(KEPT), moves)
    plain, fitted = (error(bank, stats, plan, refit, 15) for refit in (None, LeastSquares(ridge=1e-8, passes=1)))
    assert fitted < 1e-6 < plain


@pytest.mark.parametrize("kept", [[0, 2], [0, 1, 2, 3]])
def test_experts_get_narrower(kept: list[int]) -> None:
    bank = random_bank(4, 24, 6, top_k=1)
    stats = statistics(bank)
    retention = retained(bank, kept)
    how = FunctionSpace(width=0.3, parts=1, rounds=3)
    moves = calls.assign(how, bank, retention, stats)
    plan = LayerPlan(0, 4, 24, retention.scores, retention.kept, moves)
    assert plan.pool_sizes() == [8] * len(kept) and target_width([plan], Adopt()) == 8
    refitted, plain = (error(bank, stats, plan, refit, 8) for refit in (LeastSquares(), None))
    assert refitted < plain
    if len(kept) == 4:
        assert not len(moves)
        for expert, rows, coefficients in turns(bank.route(stats.router_inputs), kept):  # type: ignore[misc]
            hidden = features(bank, bank.segments(expert), stats["sample"][rows], coefficients)
            whole = equations(hidden, hidden @ bank.segments(expert)[:, -1])
            chosen = reference.eliminate(whole.gram, whole.right, damping(whole, how.ridge), 8, 3)
            assert plan.stays(expert).tolist() == chosen


def test_an_expert_without_tokens_keeps_its_largest_neurons() -> None:
    bank = random_bank(4, 16, 6, top_k=1)
    stats = statistics(bank)
    assert bank.route is not None
    first_only = bank.route(stats.router_inputs, torch.tensor([0, 2])).chosen[:, 0] == 0
    seen = {name: value[first_only] for name, value in stats.values.items() if name.startswith("sample")}
    stats = replace(stats, values={**stats.values, **seen})
    moves = calls.assign(FunctionSpace(width=0.5), bank, retained(bank, [0, 2]), stats)
    assert moves.left is not None and 1 not in moves.target
    largest = sorted(bank.down[2].norm(dim=0).topk(8).indices.tolist())
    assert [neuron for neuron in range(16) if 32 + neuron not in moves.left.tolist()] == largest


def test_a_dropped_copy_costs_nothing() -> None:
    bank = random_bank(2, 5, 4, top_k=1)
    bank = copy_expert(bank, 0, 1, torch.tensor([3, 1, 4, 0, 2]))
    stats = statistics(bank)
    retention = retained(bank, [0])
    moves = calls.assign(FunctionSpace(ridge=1e-8), bank, retention, stats)
    plan = LayerPlan(0, 2, 5, retention.scores, retention.kept, moves)
    assert error(bank, stats, plan, LeastSquares(ridge=1e-8), 5) < 1e-8


@pytest.mark.parametrize("ridge", [None, 1e-6, 1e-2, 10.0])
def test_a_refit_never_raises_the_error(ridge: float | None) -> None:
    for seed in range(6):
        bank, stats = layer(seed=seed)
        plan = plan_with(bank, stats, FunctionSpace(parts=1 + seed % 3))
        plain, fitted = (error(bank, stats, plan, refit, 5) for refit in (None, LeastSquares(ridge=ridge)))
        assert fitted <= plain * (1 + 1e-6)


def test_selection_and_refit_beat_refit_alone_and_that_beats_pruning() -> None:
    sums = [0.0, 0.0, 0.0]
    for seed in range(8):
        bank, stats = layer(seed=seed)
        chosen = plan_with(bank, stats, FunctionSpace())
        pruned = replace(chosen, assignment=chosen.assignment.empty())
        for place, (plan, refit) in enumerate([(pruned, None), (pruned, LeastSquares()), (chosen, LeastSquares())]):
            sums[place] += error(bank, stats, plan, refit, 5)
    assert sums[2] < sums[1] < sums[0]


def test_a_norm_behind_the_experts_is_refused() -> None:
    bank, stats = layer()
    bank = replace(bank, finish=lambda outputs: outputs / 2)
    with pytest.raises(CheckpointError, match="experts must end with their down projection"):
        FunctionSpace().assign(bank, retained(bank, KEPT), stats)


def test_a_sample_that_cannot_be_cut_into_parts_is_refused() -> None:
    bank, stats = layer()
    with pytest.raises(RecipeError, match=r"layer 0: must have 4 sampled inputs at least\. Got 3"):
        FunctionSpace().assign(bank, retained(bank, KEPT), first(stats, 3))


def test_outputs_that_are_not_finite_are_refused() -> None:
    bank, stats = layer()
    bank = replace(bank, act=lambda gate, up: up * torch.inf)
    with pytest.raises(CheckpointError, match="what the experts make of the sampled inputs must be finite"):
        FunctionSpace().assign(bank, retained(bank, KEPT), stats)


@pytest.mark.parametrize("tokens", [64, 6])
def test_a_pool_is_as_large_as_its_tokens_allow(tokens: int) -> None:
    """Of two dropped experts of 5 neurons each: with few tokens only a quarter more than the own 5 are looked at."""
    bank, stats = layer(top_k=1)
    few = first(stats, tokens)
    assert bank.route is not None
    arrivals = plan_with(bank, few, FunctionSpace(parts=1)).assignment
    per_expert = torch.bincount(arrivals.target, minlength=2)
    assert int(per_expert.max()) <= (1 if tokens == 6 else 5)


@pytest.mark.parametrize("exact", [4096, 0], ids=["float64", "float32"])
def test_a_matrix_of_tokens_that_is_kept_is_that_of_the_neurons_and_tokens_at_hand(
    exact: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(least_squares, "_EXACT", exact)
    rng = torch.Generator().manual_seed(0)
    hidden, wanted = torch.randn(9, 20, generator=rng), torch.randn(9, 4, generator=rng)
    whole = ByTokens(hidden, wanted)
    whole.solve(0.5)  # from here on K is kept
    for left in (torch.arange(3, 20), torch.arange(0, 20, 3)):  # more and less than half of the neurons
        torch.testing.assert_close(whole.of(left).solve(0.5), ByTokens(hidden[:, left], wanted).solve(0.5))
    order = torch.randperm(9, generator=rng)
    again = whole.towards(hidden[order], wanted[order].flip(1)).solve(0.5)
    torch.testing.assert_close(again, ByTokens(hidden, wanted.flip(1)).solve(0.5))
