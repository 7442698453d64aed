"""Selection and refit in function space against loops in float64, and what must hold exactly."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dernkit.builtin.function_space import FunctionSpace
from dernkit.builtin.merges import Adopt
from dernkit.builtin.refits import LeastSquares
from dernkit.builtin.routers import Slice
from dernkit.errors import CheckpointError
from dernkit.kernel import calls
from dernkit.kernel.after import after_surgery
from dernkit.kernel.compress import compress_layer
from dernkit.kernel.function_space import features, normal_equations, penalty, saliency, select, turns
from dernkit.kernel.layer_error import layer_error
from dernkit.testing.banks import copy_expert, random_bank, retained
from dernkit.testing.cases import statistics
from dernkit.types import ExpertBank, LayerPlan, LayerStats
from tests.reference import function_space as reference

KEPT = [0, 2]


def layer(**options: object) -> tuple[ExpertBank, LayerStats]:
    bank = random_bank(4, 5, 4, **options)  # type: ignore[arg-type]
    return bank, statistics(bank)


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
    for got, right in zip(
        normal_equations(found, wanted), reference.gram_and_right(expected, wanted.tolist()), strict=True
    ):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rounds", [1, 2, 5])
def test_saliency_is_what_the_error_rises_by_and_selection_follows_it(rounds: int) -> None:
    rng = torch.Generator().manual_seed(rounds)
    hidden, wanted = torch.randn(40, 11, generator=rng), torch.randn(40, 3, generator=rng)
    gram, right = normal_equations(hidden, wanted)
    damping = penalty(gram, 0.01)
    expected = torch.tensor(reference.saliencies(gram, right, damping, range(11)), dtype=torch.float64)
    torch.testing.assert_close(saliency(gram, right, damping), expected, rtol=1e-8, atol=1e-8)
    chosen, found = select(gram, right, damping, 4, rounds)
    assert chosen.tolist() == reference.eliminate(gram, right, damping, 4, rounds)
    torch.testing.assert_close(
        found, torch.tensor(reference.saliencies(gram, right, damping, chosen.tolist()), dtype=torch.float64)
    )


def test_the_refit_is_where_no_change_of_a_projection_lowers_its_objective() -> None:
    bank, stats = layer()
    stats = replace(stats, values={**stats.values, "sample": stats["sample"][:20]})
    plan = plan_with(bank, stats, FunctionSpace())
    made = compress_layer(bank, plan, Adopt(), Slice(), bank.dims.width, 0, stats)
    after = after_surgery(made, bank, plan.kept)
    assert bank.route is not None and after.route is not None
    before, now = bank.route(stats.router_inputs), after.route(stats.router_inputs)
    down = LeastSquares(passes=60).refit(bank, after, plan, stats)

    def objective(projections: torch.Tensor) -> float:
        return reference.objective(bank, after, stats["sample"], before, now, projections, LeastSquares().ridge)

    best = objective(down)
    assert best < objective(after.down)
    rng = torch.Generator().manual_seed(2)
    for size in (0.3, 0.01):
        for _ in range(4):
            assert objective(down + size * torch.randn(down.shape, generator=rng)) > best * (1 - 1e-6)


def test_with_room_for_the_whole_pool_the_layer_gives_what_it_gave() -> None:
    """With fewer tokens than neurons: the pool of one expert cannot be several experts for all tokens there are."""
    bank, stats = layer(top_k=1)
    stats = replace(stats, values={**stats.values, "sample": stats["sample"][:10]})
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


def test_a_dropped_copy_costs_nothing() -> None:
    bank = random_bank(2, 5, 4, top_k=1)
    bank = copy_expert(bank, 0, 1, torch.tensor([3, 1, 4, 0, 2]))
    stats = statistics(bank)
    retention = retained(bank, [0])
    moves = calls.assign(FunctionSpace(ridge=1e-8), bank, retention, stats)
    plan = LayerPlan(0, 2, 5, retention.scores, retention.kept, moves)
    assert error(bank, stats, plan, LeastSquares(ridge=1e-8), 5) < 1e-8


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 10.0])
def test_a_refit_never_raises_the_error(ridge: float) -> None:
    for seed in range(6):
        bank, stats = layer(seed=seed)
        plan = plan_with(bank, stats, FunctionSpace())
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
