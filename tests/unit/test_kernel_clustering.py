import pytest
import torch

from dernkit.kernel.clustering import choose_seeds, cluster_means, first_of_kind, spherical_kmeans


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("equalise", [True, False])
def test_the_only_member_of_a_cluster_keeps_its_bits(rescale: bool, equalise: bool) -> None:
    pool = normal(50, 3, 7)
    seeds = torch.arange(50)
    weights = torch.rand(50, generator=torch.Generator().manual_seed(1))
    assert torch.equal(spherical_kmeans(pool, weights, seeds, rescale=rescale, equalise=equalise), pool)


def test_an_empty_cluster_keeps_its_centroid() -> None:
    pool = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])[:, None]
    assert torch.equal(spherical_kmeans(pool, torch.ones(3), torch.tensor([0, 1, 2])), pool)


def test_weights_of_0_count_equally() -> None:
    flat = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    means = cluster_means(
        flat,
        torch.tensor([0.0, 0.0, 5.0]),
        rows=torch.arange(3),
        labels=torch.tensor([0, 0, 1]),
        clusters=2,
        equalise=True,
        rescale=False,
    )
    torch.testing.assert_close(means, torch.tensor([[1.0, 1.0], [1.0, 1.0]]))


def test_a_member_of_weight_0_beside_others_has_no_say() -> None:
    flat = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    same = {"rows": torch.arange(2), "labels": torch.zeros(2, dtype=torch.int64), "clusters": 1}
    means = cluster_means(flat, torch.tensor([1.0, 0.0]), **same, equalise=True, rescale=True)
    assert torch.equal(means, flat[:1])


def test_opposite_members_give_a_zero_centroid_and_not_nan() -> None:
    flat = torch.tensor([[1.0, 2.0], [-1.0, -2.0]])
    same = {"rows": torch.arange(2), "labels": torch.zeros(2, dtype=torch.int64), "clusters": 1}
    assert torch.equal(cluster_means(flat, torch.ones(2), **same, equalise=True, rescale=True), torch.zeros(1, 2))


@pytest.mark.parametrize("chunk", [1, 7, 64, None])
def test_chunks_do_not_change_a_bit(chunk: int | None) -> None:
    pool, weights, seeds = normal(90, 2, 5), torch.ones(90), torch.arange(0, 90, 9)
    assert torch.equal(
        spherical_kmeans(pool, weights, seeds, chunk=chunk), spherical_kmeans(pool, weights, seeds, chunk=90)
    )


def test_first_of_kind_finds_bitwise_repeats_and_nothing_else() -> None:
    rows = normal(40, 6)
    rows[[30, 35]] = rows[[4, 4]]
    rows[7] = torch.nextafter(rows[5], torch.tensor(9.0))
    rows[8], rows[9] = 0.0, -0.0
    assert (~first_of_kind(rows)).nonzero().flatten().tolist() == [9, 30, 35]


def test_seeds_are_distinct_and_follow_the_order() -> None:
    pool = torch.tensor([1.0, 2.0, 1.0, 3.0, 2.0])[:, None, None]
    assert choose_seeds(pool, torch.tensor([4, 3, 2, 1, 0]), own=2, count=2).tolist() == [1, 3]


def test_seeds_repeat_own_segments_only_when_room_is_left() -> None:
    pool = torch.tensor([1.0, 1.0, 2.0, 1.0, 2.0, 2.0])[:, None, None]
    order = torch.arange(6)
    assert choose_seeds(pool, order, own=3, count=2).tolist() == [0, 2]
    assert choose_seeds(pool, order, own=3, count=3).tolist() == [0, 1, 2]
    assert choose_seeds(pool, order, own=3, count=5).tolist() == [0, 1, 2]
