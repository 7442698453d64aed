import pytest
import torch

from dernkit.builtin.merges import Concatenate, SphericalKMeans, WeightedAverage
from dernkit.types import LayerStats, Pool

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
    assert Concatenate.widens and not SphericalKMeans.widens and not WeightedAverage.widens
