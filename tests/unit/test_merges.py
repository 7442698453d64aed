from dataclasses import replace

import pytest
import torch

from dernkit.builtin.merges import Concatenate, Keep, KMeansActivation, Slerp, SphericalKMeans, WeightedAverage
from dernkit.builtin.routers import Slice
from dernkit.errors import ContractError, RecipeError
from dernkit.kernel.averaging import slerp
from dernkit.kernel.compress import compress_layer
from dernkit.testing.banks import random_bank, random_pool, random_stats
from dernkit.types import Assignment, LayerPlan, LayerStats, Pool

INITS = ["gate-norm", "own", "random"]


def pool(own: torch.Tensor, incoming: torch.Tensor, *, own_weight: float = 1.0, weight: float = 1.0) -> Pool:
    count = len(incoming)
    return Pool(
        own=own,
        own_weight=own_weight,
        incoming=incoming,
        incoming_weight=torch.full((count,), weight),
        partner=torch.arange(count) % len(own),
        affinity=torch.ones(count),
        expert=0,
        incoming_expert=torch.ones(count, dtype=torch.int64),
        act=lambda gate, up: up if gate is None else gate * up,
        stats=LayerStats(0),
    )


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("weights", ["score", "uniform"])
def test_kmeans_returns_the_width(init: str, weights: str) -> None:
    merged = SphericalKMeans(init=init, weights=weights).merge(pool(normal(8, 3, 4), normal(6, 3, 4, seed=1)), 8, rng())
    assert merged.shape == (8, 3, 4) and merged.dtype == torch.float32


def test_kmeans_begins_at_the_largest_infinity_norms_of_the_gate() -> None:
    own, incoming = torch.eye(4)[:2, None].repeat(1, 2, 1), torch.eye(4)[2:, None].repeat(1, 2, 1)
    own[0, 0] *= 9
    incoming[1, 0] *= 5
    own[1, 1] *= 100  # the up part has no say
    merged = SphericalKMeans(iterations=1, rescale=False).merge(pool(own, incoming), 2, rng())
    assert torch.equal(merged[1], incoming[1])
    assert merged[0, 0, 0] > 0


def test_own_init_keeps_own_neurons_in_their_places() -> None:
    own = normal(6, 3, 4)
    incoming = own[[3]] * 1.01
    merged = SphericalKMeans(init="own").merge(pool(own, incoming), 6, rng())
    assert torch.equal(merged[[0, 1, 2, 4, 5]], own[[0, 1, 2, 4, 5]])
    torch.testing.assert_close(merged[3], own[3] * 1.005)


def test_random_init_follows_the_generator() -> None:
    both = pool(normal(8, 3, 4), normal(8, 3, 4, seed=1))
    draws = [SphericalKMeans(init="random").merge(both, 8, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_score_weights_pull_a_centroid_to_the_better_expert() -> None:
    own, incoming = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.8, 0.6]]])
    heavy, light = (
        SphericalKMeans().merge(pool(own, incoming, own_weight=weight), 1, rng())[0, 0, 1] for weight in (9.0, 0.1)
    )
    assert heavy < light


def test_rescale_gives_a_centroid_the_mean_norm_of_its_cluster() -> None:
    own, incoming = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])
    merged = SphericalKMeans().merge(pool(own, incoming), 1, rng())
    assert float(merged.norm()) == pytest.approx(3.0)
    shrunken = SphericalKMeans(rescale=False).merge(pool(own, incoming), 1, rng())
    torch.testing.assert_close(shrunken, torch.tensor([[[1.5, 1.5]]]))
    plain = SphericalKMeans(rescale=False, equalise=False).merge(pool(own, incoming), 1, rng())
    torch.testing.assert_close(plain, torch.tensor([[[1.0, 2.0]]]))


STATS = random_stats(random_bank(4, 8, 6))
MERGES = [
    Keep(),
    WeightedAverage(),
    WeightedAverage(weights="frequency", rescale=True),
    SphericalKMeans(),
    SphericalKMeans(init="random"),
    SphericalKMeans(weights="frequency", init="own", rescale=False),
    KMeansActivation(),
    KMeansActivation(tokens=1, weights="frequency"),
    KMeansActivation(init="own", equalise=False, rescale=False, weights="uniform"),
    Slerp(),
    Slerp(along="segment", weights="frequency"),
    Concatenate(),
]
every_merge = pytest.mark.parametrize("merge", MERGES, ids=repr)
without_concatenate = pytest.mark.parametrize("merge", MERGES[:-1], ids=repr)


@without_concatenate
@pytest.mark.parametrize(("parts", "features"), [(3, 6), (2, 6), (3, 7)])
@pytest.mark.parametrize("arrivals", [1, 3, 20])
def test_merges_keep_the_width_the_dtype_and_their_inputs_and_repeat_themselves(
    merge: object, parts: int, features: int, arrivals: int
) -> None:
    both = random_pool(8, arrivals, parts, features, stats=STATS)
    before = replace(both, own=both.own.clone(), incoming=both.incoming.clone())
    sample = STATS["sample"].clone()
    merged = merge.merge(both, 8, rng())
    assert merged.shape == (8, parts, features) and merged.dtype == torch.float32 and bool(merged.isfinite().all())
    assert torch.equal(merged, merge.merge(both, 8, rng()))
    assert torch.equal(both.own, before.own) and torch.equal(both.incoming, before.incoming)
    assert torch.equal(STATS["sample"], sample)


@every_merge
def test_weights_and_statistics_of_0_give_finite_segments(merge: object) -> None:
    dead = LayerStats(0, {name: value * 0 for name, value in STATS.values.items()}, STATS.sample_size)
    both = random_pool(8, 7, stats=dead)
    empty = replace(both, own_weight=0.0, incoming_weight=both.incoming_weight * 0)
    for pool in (both, empty, replace(both, own=both.own * 0), replace(both, incoming=both.incoming * 0)):
        assert bool(merge.merge(pool, 16, rng()).isfinite().all())


@pytest.mark.parametrize("merge", [merge for merge in MERGES if "random" not in repr(merge)], ids=repr)
def test_the_order_of_arrivals_means_nothing(merge: object) -> None:
    both = random_pool(8, 20, stats=STATS)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(5))
    names = ("incoming", "incoming_weight", "partner", "affinity", "incoming_expert")
    other = replace(both, **{name: getattr(both, name)[order] for name in names})
    one, two = (merge.merge(pool, 28, rng()).flatten(1) for pool in (both, other))
    nearest = torch.cdist(one, two, compute_mode="donot_use_mm_for_euclid_dist").min(1)
    assert sorted(nearest.indices.tolist()) == list(range(len(one))) and float(nearest.values.max()) < 1e-5


def test_keep_drops_what_arrives() -> None:
    both = pool(normal(4, 2, 3), normal(2, 2, 3, seed=1))
    assert torch.equal(Keep().merge(both, 4, rng()), both.own)


@pytest.mark.parametrize("merge", [SphericalKMeans(), SphericalKMeans(init="random"), WeightedAverage(), Concatenate()])
def test_weights_of_0_give_no_nan(merge: object) -> None:
    merged = merge.merge(pool(normal(4, 2, 3), normal(4, 2, 3, seed=1), own_weight=0.0, weight=0.0), 8, rng())
    assert bool(merged.isfinite().all())


@pytest.mark.parametrize("init", INITS)
def test_zero_segments_are_left_out(init: str) -> None:
    own, incoming = normal(4, 2, 3), torch.zeros(2, 2, 3)
    own[2] = 0
    merged = SphericalKMeans(init=init).merge(pool(own, incoming), 4, rng())
    assert torch.equal(merged, own[[0, 1, 3]])
    assert len(SphericalKMeans(init=init).merge(pool(own * 0, incoming), 4, rng())) == 0


def test_weighted_average_by_hand() -> None:
    own = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]], [[5.0, 5.0]]])
    incoming = torch.tensor([[[0.0, 2.0]], [[4.0, 1.0]]])
    merged = WeightedAverage().merge(pool(own, incoming, own_weight=3.0), 3, rng())
    torch.testing.assert_close(merged[:2], torch.tensor([[[0.75, 0.5]], [[1.0, 1.0]]]))
    assert torch.equal(merged[2], own[2])


@pytest.mark.parametrize("rescale", [True, False])
def test_weighted_average_keeps_the_bits_of_neurons_without_arrivals(rescale: bool) -> None:
    own = normal(50, 3, 7)
    merged = WeightedAverage(rescale=rescale).merge(pool(own, normal(5, 3, 7, seed=1), own_weight=0.3), 50, rng())
    assert torch.equal(merged[5:], own[5:])


def test_concatenate_puts_arrivals_after_own() -> None:
    both = pool(normal(4, 2, 3), normal(2, 2, 3, seed=1))
    assert torch.equal(Concatenate().merge(both, 64, rng()), torch.cat([both.own, both.incoming]))
    assert Concatenate.widens and not any(merge.widens for merge in MERGES[:-1])


def test_frequency_weights_are_the_tokens_routed_to_the_experts_of_the_segments() -> None:
    own, incoming = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 2.0]], [[4.0, 1.0]]])
    both = replace(pool(own, incoming), partner=torch.tensor([0, 0]), incoming_expert=torch.tensor([2, 1]), expert=3)
    both = replace(both, stats=LayerStats(9, {"routed": torch.tensor([7, 3, 1, 6], dtype=torch.float64)}))
    merged = WeightedAverage(weights="frequency").merge(both, 1, rng())
    torch.testing.assert_close(merged, torch.tensor([[[1.8, 0.5]]]))


@pytest.mark.parametrize("merge", [WeightedAverage, SphericalKMeans, KMeansActivation, Slerp])
def test_merges_ask_for_the_statistics_of_their_weights(merge: type) -> None:
    sample = {"sample"} if merge is KMeansActivation else set()
    assert merge().requires == merge(weights="uniform").requires == sample
    assert merge(weights="frequency").requires == sample | {"routed"}


@pytest.mark.parametrize("merge", [WeightedAverage(), WeightedAverage(rescale=True), Slerp(), Slerp(along="segment")])
def test_the_mean_of_equal_neurons_is_that_neuron_bit_for_bit(merge: object) -> None:
    own = normal(200, 3, 33)
    for weight in (0.3, 0.0, 1e-30, 7e8):
        both = pool(own, own.repeat(3, 1, 1), own_weight=0.1, weight=weight)
        both = replace(both, incoming_weight=both.incoming_weight * torch.rand(600, generator=rng()))
        assert torch.equal(merge.merge(both, 200, rng()), own)


def test_an_average_does_not_depend_on_how_many_neurons_are_summed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    both = random_pool(30, 100, features=5)
    whole = WeightedAverage(rescale=True).merge(both, 30, rng()), Slerp().merge(both, 30, rng())
    monkeypatch.setattr("dernkit.kernel.matching.CACHE", 1000)
    parts = WeightedAverage(rescale=True).merge(both, 30, rng()), Slerp().merge(both, 30, rng())
    assert all(torch.equal(one, other) for one, other in zip(whole, parts, strict=True))


def test_slerp_goes_to_the_closest_arrival_first_then_to_the_heaviest() -> None:
    a, b, c = (torch.nn.functional.normalize(normal(1, 2, 3, seed=seed), dim=2) for seed in range(3))
    both = replace(pool(a, torch.cat([b, c])), partner=torch.tensor([0, 0]))

    def steps(*arrivals: torch.Tensor, weights: list[float]) -> torch.Tensor:
        merged, total = a, 1.0
        for arrival, weight in zip(arrivals, weights, strict=True):
            total += weight
            merged = slerp(merged, arrival, torch.full((1, 1), weight / total, dtype=torch.float64))
        return merged

    near = replace(both, affinity=torch.tensor([0.2, 0.9]))
    torch.testing.assert_close(Slerp().merge(near, 1, rng()), steps(c, b, weights=[1, 1]))
    heavy = replace(both, incoming_weight=torch.tensor([0.5, 2.0]))
    torch.testing.assert_close(Slerp().merge(heavy, 1, rng()), steps(c, b, weights=[2, 0.5]))
    torch.testing.assert_close(Slerp().merge(both, 1, rng()), steps(b, c, weights=[1, 1]))
    assert not torch.allclose(steps(b, c, weights=[1, 1]), steps(c, b, weights=[1, 1]))


def test_slerp_keeps_a_length_that_the_average_loses() -> None:
    own, incoming = torch.tensor([[[2.0, 0.0]]]), torch.tensor([[[0.0, 4.0]]])
    both = pool(own, incoming)
    torch.testing.assert_close(Slerp().merge(both, 1, rng()), torch.full((1, 1, 2), 3 / 2**0.5))
    assert float(WeightedAverage().merge(both, 1, rng()).norm()) < 2.3


def test_neurons_with_the_same_activation_are_one_cluster_whatever_their_weights() -> None:
    """The sample lies in a plane: what weights are outside it does not matter."""
    sample = torch.cat([normal(30, 2), torch.zeros(30, 2)], dim=1)
    own = normal(3, 3, 4, seed=1)
    incoming = own.clone()
    incoming[:, :2, 2:] = 50 * normal(3, 2, 2, seed=2)  # gate and up, where no input ever is
    both = replace(pool(own, incoming), stats=LayerStats(30, {"sample": sample}))
    merged = KMeansActivation(init="own", equalise=False, rescale=False).merge(both, 3, rng())
    torch.testing.assert_close(merged, (own + incoming) / 2)
    by_weight = SphericalKMeans(init="own", equalise=False, rescale=False).merge(both, 3, rng())
    assert not torch.allclose(by_weight, merged)


def test_silent_neurons_take_what_room_is_left_the_own_ones_first() -> None:
    sample = torch.cat([normal(30, 3), torch.zeros(30, 1)], dim=1)
    own, incoming = normal(4, 3, 4, seed=1), normal(4, 3, 4, seed=2)
    own[1:3, :2, :3] = 0  # they see the last feature alone
    incoming[2:, :2, :3] = 0
    incoming[3] = 0
    both = replace(pool(own, incoming[2:]), stats=LayerStats(30, {"sample": sample}))
    merged = KMeansActivation().merge(both, 4, rng())
    assert torch.equal(merged, own[[0, 3, 1, 2]])
    narrow = KMeansActivation().merge(both, 3, rng())
    assert torch.equal(narrow, own[[0, 3, 1]])
    wide = KMeansActivation().merge(both, 9, rng())
    assert torch.equal(wide, torch.cat([own[[0, 3, 1, 2]], incoming[[2]]]))
    none = replace(both, own=own[1:3], incoming=incoming[2:])
    assert torch.equal(KMeansActivation().merge(none, 2, rng()), own[1:3])


def test_only_so_many_sampled_tokens_are_looked_at() -> None:
    both = random_pool(8, 20, stats=STATS)
    first = replace(both, stats=LayerStats(9, {"sample": STATS["sample"][:5]}))
    assert torch.equal(KMeansActivation(tokens=5).merge(both, 8, rng()), KMeansActivation().merge(first, 8, rng()))
    assert not torch.equal(KMeansActivation(tokens=5).merge(both, 8, rng()), KMeansActivation().merge(both, 8, rng()))


def moving(bank_experts: int = 4, width: int = 8) -> LayerPlan:
    """Expert 0 gives 6 of 8 neurons to expert 1 (position 0); expert 3 receives nothing."""
    index = torch.arange(6)
    moves = Assignment(index, torch.zeros(6, dtype=torch.int64), index, torch.ones(6))
    return LayerPlan(0, bank_experts, width, torch.tensor([2.0, 1.0, 0.0, 5.0]).double(), torch.tensor([1, 3]), moves)


@pytest.mark.parametrize("merge", [WeightedAverage(), Slerp()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_down_biases_are_averaged_by_the_share_that_moved(merge: object, dtype: torch.dtype) -> None:
    bank = random_bank(4, 8, 6, bias=True, dtype=dtype)
    out = compress_layer(bank, moving(), merge, Slice(), 8, 0)
    expected = (bank.down_bias[1].float() + 6 / 8 * 2 * bank.down_bias[0].float()) / 2.5
    assert out.down_bias.dtype == dtype
    torch.testing.assert_close(out.down_bias[0], expected.to(dtype))
    assert torch.equal(out.down_bias[1], bank.down_bias[3])


@pytest.mark.parametrize("merge", [Keep(), SphericalKMeans(), KMeansActivation(), Concatenate()])
def test_other_merges_leave_the_down_bias_to_its_expert(merge: object) -> None:
    bank = random_bank(4, 8, 6, bias=True)
    out = compress_layer(bank, moving(), merge, Slice(), 16, 0, STATS)
    assert torch.equal(out.down_bias, bank.down_bias[[1, 3]])


@pytest.mark.parametrize(
    ("bias", "law"),
    [
        (torch.ones(5, dtype=torch.float64), "shape"),
        (torch.ones(6), "dtype"),
        (torch.full((6,), torch.nan, dtype=torch.float64), "finite"),
    ],
)
def test_a_merged_bias_is_held_to_its_contract(bias: torch.Tensor, law: str) -> None:
    class Broken:
        name, requires, widens = "broken", frozenset(), False

        def merge(self, pool: Pool, width: int, rng: torch.Generator) -> torch.Tensor:
            return pool.own

        def merge_bias(self, pool: Pool) -> torch.Tensor:
            return bias

    bank = random_bank(4, 8, 6, bias=True)
    with pytest.raises(ContractError, match=rf"^merge 'broken', layer 0: the down bias of expert 1 must .*law {law}\)"):
        compress_layer(bank, moving(), Broken(), Slice(), 8, 0)


@pytest.mark.parametrize("merge", [Keep(), Slerp()])
def test_merges_that_keep_the_width_refuse_a_smaller_one(merge: object) -> None:
    with pytest.raises(RecipeError, match=rf"^apply.width, .* at least 8 for the merge '{merge.name}', which keeps"):
        compress_layer(random_bank(4, 8, 6), moving(), merge, Slice(), 4, 0)


@pytest.mark.parametrize("merge", [SphericalKMeans(), KMeansActivation()])
def test_merges_that_cluster_make_experts_narrower(merge: object) -> None:
    out = compress_layer(random_bank(4, 8, 6), moving(), merge, Slice(), 4, 0, STATS)
    assert out.up.shape == (2, 4, 6) and bool(out.up.any(2).all())
