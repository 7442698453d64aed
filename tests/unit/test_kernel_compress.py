from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

import pytest
import torch

from dernkit.builtin.assigners import Affinity
from dernkit.builtin.merges import Concatenate, SphericalKMeans, WeightedAverage
from dernkit.builtin.routers import Additive, Slice
from dernkit.builtin.selectors import TopScore
from dernkit.errors import CheckpointError, RecipeError
from dernkit.kernel.compress import compress_layer, target_width
from dernkit.kernel.planning import plan_from_scores
from dernkit.kernel.seeding import generator
from dernkit.kernel.segments import split
from dernkit.testing.banks import random_bank
from dernkit.types import Assignment, ExpertBank, LayerPlan, LayerStats, Pool

SCORES = torch.tensor([4, 1, 3, 2], dtype=torch.float64)


def plan_for(bank: ExpertBank, quantile: float = 0.5) -> LayerPlan:
    return plan_from_scores(bank, LayerStats(0), SCORES, 2, TopScore(), Affinity(quantile=quantile))


@dataclass(frozen=True)
class Scripted:
    """A merge and a router that do what they are told."""

    result: Callable[[object], torch.Tensor]
    name: ClassVar[str] = "scripted"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = False

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> torch.Tensor:
        return self.result(pool)

    def update(self, rows: torch.Tensor, plan: LayerPlan, stats: LayerStats) -> torch.Tensor:
        return self.result(rows)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_split_is_the_inverse_of_segments(gated: bool, bias: bool) -> None:
    bank = random_bank(gated=gated, bias=bias)
    parts = split(bank.segments(2), bank)
    for name in ("gate", "up", "down", "gate_bias", "up_bias"):
        whole, part = getattr(bank, name), getattr(parts, name)
        assert (whole is None and part is None) or torch.equal(whole[2], part)


def test_pools_hold_own_and_arriving_segments_with_the_scores_of_their_experts() -> None:
    bank, pools = random_bank(4, 5, 3), []
    plan = plan_for(bank)
    compress_layer(bank, plan, Scripted(lambda pool: pools.append(pool) or pool.own), Slice(), 5, 0)
    targets = [position for position in range(2) if (plan.assignment.target == position).any()]
    assert len(pools) == len(targets) == 2
    for position, pool in zip(targets, pools, strict=True):
        chosen = plan.assignment.target == position
        source = plan.assignment.source[chosen]
        expert = int(plan.kept[position])
        assert torch.equal(pool.own, bank.segments(expert)) and pool.own_weight == SCORES[expert]
        assert torch.equal(pool.incoming_weight.double(), SCORES[source // 5])
        assert torch.equal(pool.partner, plan.assignment.partner[chosen])
        for row, segment in zip(source.tolist(), pool.incoming, strict=True):
            assert torch.equal(bank.segments(row // 5)[row % 5], segment)


@pytest.mark.parametrize("scores", [[0.0] * 4, [-1.0, -2.0, -1.5, -3.0]])
def test_scores_of_0_or_less_weigh_1(scores: list[float]) -> None:
    bank, pools = random_bank(4, 5, 3), []
    plan = replace(plan_for(bank), scores=torch.tensor(scores, dtype=torch.float64))
    compress_layer(bank, plan, Scripted(lambda pool: pools.append(pool) or pool.own), Slice(), 5, 0)
    assert all(pool.own_weight == 1 and bool((pool.incoming_weight == 1).all()) for pool in pools)


def test_router_rows_that_do_not_change_keep_bits_that_float32_lacks() -> None:
    bank = random_bank(4, 5, 3)
    bank = replace(bank, router=bank.router.double() / 3)
    out = compress_layer(bank, plan_for(bank, 0.0), None, Additive(), 5, 0)
    assert torch.equal(out.router, bank.router[plan_for(bank).kept])


def test_moves_need_a_merge() -> None:
    bank = random_bank(4, 5, 3)
    with pytest.raises(RecipeError, match=r"apply\.merge, layer 0, expert 0: must be given"):
        compress_layer(bank, plan_for(bank), None, Slice(), 5, 0)


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(CheckpointError, match=r"must be made for this model, 4 experts of 6 neurons. Got .* of 5"):
        compress_layer(random_bank(4, 6, 3), plan_for(random_bank(4, 5, 3)), None, Slice(), 5, 0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_broken_weights_are_refused_by_layer_and_expert(value: float) -> None:
    bank = random_bank(4, 5, 3, layer=7)
    plan = plan_for(bank)
    bank.up[1, 2, 0] = value
    with pytest.raises(CheckpointError, match="layer 7, expert 1: weights must be finite"):
        compress_layer(bank, plan, SphericalKMeans(), Slice(), 5, 0)


def test_per_expert_tensors_are_cut_where_they_count_experts() -> None:
    bank = random_bank(4, 5, 3)
    extras = {"bias": torch.arange(4), "scale": torch.arange(12).view(3, 4), "square": torch.arange(16).view(4, 4)}
    out = compress_layer(replace(bank, per_expert=extras), plan_for(bank, 0.0), None, Slice(), 5, 0)
    assert out.per_expert["bias"].tolist() == [0, 2]
    assert torch.equal(out.per_expert["scale"], extras["scale"][:, [0, 2]])
    assert torch.equal(out.per_expert["square"], extras["square"][:, [0, 2]])
    with pytest.raises(CheckpointError, match=r"layer 0, odd: must have a dimension of 4 experts. Got shape \[5\]"):
        compress_layer(replace(bank, per_expert={"odd": torch.ones(5)}), plan_for(bank), None, Slice(), 5, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_results_have_the_dtype_of_the_checkpoint(dtype: torch.dtype) -> None:
    bank = random_bank(4, 5, 3, bias=True, dtype=dtype)
    out = compress_layer(bank, plan_for(bank), SphericalKMeans(), Additive(), 5, 0)
    for name in ("gate", "up", "down", "gate_bias", "up_bias", "down_bias", "router"):
        assert getattr(out, name).dtype == dtype
    assert torch.equal(out.down_bias, bank.down_bias[plan_for(bank).kept])


def test_experts_without_arrivals_keep_their_bits_and_are_padded_with_zeros() -> None:
    bank = random_bank(4, 5, 3, bias=True, dtype=torch.bfloat16)
    plan = replace(plan_for(bank), assignment=_only_first_target(plan_for(bank, 1.0).assignment))
    out = compress_layer(bank, plan, Concatenate(), Additive(), 16, 0)
    assert torch.equal(out.up[1, :5], bank.up[2]) and not out.up[1, 5:].any()
    assert torch.equal(out.down[1, :, :5], bank.down[2]) and not out.down[1, :, 5:].any()
    assert torch.equal(out.gate_bias[1, :5], bank.gate_bias[2]) and not out.gate_bias[1, 5:].any()
    assert torch.equal(out.router[1], bank.router[2]) and not torch.equal(out.router[0], bank.router[0])


def _only_first_target(moves: Assignment) -> Assignment:
    chosen = moves.target == 0
    return Assignment(moves.source[chosen], moves.target[chosen], moves.partner[chosen], moves.affinity[chosen])


def test_random_numbers_depend_on_seed_layer_and_expert_only() -> None:
    def draws(seed: int, layer: int) -> list[list[float]]:
        bank = random_bank(4, 5, 3, layer=layer)
        seen: list[torch.Tensor] = []

        @dataclass(frozen=True)
        class Drawing:
            name: ClassVar[str] = "drawing"
            requires: ClassVar[frozenset[str]] = frozenset()
            widens: ClassVar[bool] = False

            def merge(self, pool: Pool, width: int, rng: torch.Generator) -> torch.Tensor:
                seen.append(torch.rand(3, generator=rng))
                return pool.own

        compress_layer(bank, plan_for(bank, 1.0), Drawing(), Slice(), 5, seed)
        return [draw.tolist() for draw in seen]

    assert draws(0, 0) == draws(0, 0)
    results = [draws(0, 0), draws(1, 0), draws(0, 1)]
    flat = [tuple(draw) for result in results for draw in result]
    assert len(set(flat)) == len(flat) == 6
    assert torch.equal(torch.rand(2, generator=generator(1, 2)), torch.rand(2, generator=generator(1, 2)))
    assert not torch.equal(torch.rand(2, generator=generator(1, 2)), torch.rand(2, generator=generator(12)))


def test_target_width_is_that_of_the_widest_pool_rounded_up() -> None:
    plans = [plan_for(random_bank(4, 5, 3)), plan_for(random_bank(4, 5, 3), 1.0)]
    widest = max(plans[1].pool_sizes())
    assert widest > max(plans[0].pool_sizes())
    assert target_width(plans, Concatenate(), multiple=4) == -(-widest // 4) * 4
    assert target_width(plans, Concatenate()) == 64
    assert target_width(plans, SphericalKMeans()) == target_width(plans, None) == 5


def test_target_width_stays_where_nothing_moves() -> None:
    plans = [plan_for(random_bank(4, 5, 3), 0.0)] * 2
    assert target_width(plans, Concatenate()) == 5


@pytest.mark.parametrize("merge", [SphericalKMeans(), WeightedAverage(), Concatenate()])
def test_one_segment_may_arrive_at_several_experts(merge: object) -> None:
    bank = random_bank(4, 5, 3)
    index = torch.tensor([5, 5])
    moves = Assignment(index, torch.tensor([0, 1]), torch.tensor([2, 3]), torch.ones(2))
    out = compress_layer(bank, replace(plan_for(bank), assignment=moves), merge, Slice(), 8, 0)
    assert out.up.shape == (2, 8, 3) and bool(out.up.isfinite().all())
