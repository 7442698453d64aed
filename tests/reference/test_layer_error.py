"""The fast layer error against the slow one of `tests.reference.layer_error`, and what it must not depend on."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dernkit.builtin.merges import Concatenate, SphericalKMeans, WeightedAverage
from dernkit.builtin.routers import Additive, LogMass, Slice
from dernkit.errors import CheckpointError
from dernkit.kernel import layer_error as fast
from dernkit.kernel.compress import compress_layer
from dernkit.kernel.layer_error import layer_error
from dernkit.testing.banks import permute_experts, random_bank, random_stats
from dernkit.types import Assignment, CompressedLayer, ExpertBank, LayerPlan, LayerStats
from tests.reference import layer_error as slow

KEPT = torch.tensor([0, 2, 5])


def plan(bank: ExpertBank, kept: torch.Tensor, moves: int = 12, seed: int = 0) -> LayerPlan:
    """Segments drawn from the experts that go, to kept ones that are drawn as well."""
    dims, rng = bank.dims, torch.Generator().manual_seed(seed)
    gone = torch.tensor([expert for expert in range(dims.experts) if expert not in kept.tolist()])
    source = (gone[:, None] * dims.width + torch.arange(dims.width)).flatten()
    source = source[torch.randperm(len(source), generator=rng)[:moves].sort().values]
    target, partner = (torch.randint(0, high, (len(source),), generator=rng) for high in (len(kept), dims.width))
    scores = 0.1 + torch.rand(dims.experts, generator=rng, dtype=torch.float64)
    assignment = Assignment(source, target, partner, torch.full((len(source),), 0.5))
    return LayerPlan(dims.layer, dims.experts, dims.width, scores, kept, assignment)


def compressed(bank: ExpertBank, merge: Any, router: Any, stats: LayerStats) -> tuple[CompressedLayer, LayerPlan]:
    decided = plan(bank, KEPT)
    width = max(decided.pool_sizes()) if merge.widens else bank.dims.width
    return compress_layer(bank, decided, merge, router, width, 0, stats), decided


@pytest.mark.parametrize("router", [Slice(), Additive(), LogMass()], ids=lambda router: router.name)
@pytest.mark.parametrize("merge", [SphericalKMeans(), WeightedAverage(), Concatenate()], ids=lambda merge: merge.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_is_the_formula(router: Any, merge: Any, dtype: torch.dtype) -> None:
    bank = random_bank(6, 5, 4, dtype=dtype)
    stats = random_stats(bank, sample=14)
    layer, decided = compressed(bank, merge, router, stats)
    expected = slow.layer_error(bank, layer, decided.kept.tolist(), stats["sample"].double().tolist())
    assert layer_error(bank, layer, KEPT, stats) == pytest.approx(expected, rel=1e-4)
    assert expected and expected > 0.01


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = random_bank(6, 5, 4)
    stats = random_stats(bank, sample=14)
    layer, _ = compressed(bank, SphericalKMeans(), Additive(), stats)
    whole = layer_error(bank, layer, KEPT, stats)
    monkeypatch.setattr(fast, "_CHUNK", 3 * bank.dims.hidden)
    assert layer_error(bank, layer, KEPT, stats) == pytest.approx(whole, rel=1e-6)


def test_it_does_not_depend_on_the_order_of_experts() -> None:
    bank, order = random_bank(6, 5, 4), torch.tensor([3, 5, 1, 0, 2, 4])
    stats = random_stats(bank, sample=14)
    kept = torch.tensor([int((order == expert).nonzero()) for expert in KEPT])
    errors = []
    for each, which in ((bank, KEPT), (permute_experts(bank, order), kept.sort().values)):
        scores = torch.ones(6, dtype=torch.float64)
        decided = LayerPlan(each.dims.layer, 6, each.dims.width, scores, which, Assignment.empty())
        errors.append(layer_error(each, compress_layer(each, decided, None, Slice(), 5, 0), which, stats))
    assert errors[0] == pytest.approx(errors[1], rel=1e-5)


def test_there_is_none_without_a_sample_a_route_or_an_output() -> None:
    bank = random_bank(6, 5, 4)
    stats = random_stats(bank, sample=14)
    layer, _ = compressed(bank, SphericalKMeans(), Slice(), stats)
    assert layer_error(bank, layer, KEPT, stats.only(frozenset({"routed"}))) is None
    assert layer_error(replace(bank, route=None), layer, KEPT, stats) is None
    unseen = replace(stats, values={**stats.values, "router_sample": stats["sample"][:, :0]})
    assert layer_error(bank, layer, KEPT, unseen) is None
    assert layer_error(replace(bank, down=torch.zeros_like(bank.down)), layer, KEPT, stats) is None


def test_what_is_not_finite_is_refused() -> None:
    bank = random_bank(6, 5, 4)
    stats = random_stats(bank, sample=14)
    layer, _ = compressed(bank, SphericalKMeans(), Slice(), stats)
    with pytest.raises(CheckpointError, match="must be finite, before and after surgery"):
        layer_error(replace(bank, up=bank.up * 1e30), layer, KEPT, stats)


def test_nothing_is_written_to() -> None:
    bank = random_bank(6, 5, 4)
    stats = random_stats(bank, sample=14)
    layer, _ = compressed(bank, SphericalKMeans(), Additive(), stats)
    tensors = [bank.up, bank.router, layer.up, layer.router, stats["sample"], KEPT]
    before = [tensor.clone() for tensor in tensors]
    layer_error(bank, layer, KEPT, stats)
    assert all(map(torch.equal, tensors, before))
