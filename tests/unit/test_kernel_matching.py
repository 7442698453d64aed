import pytest
import torch

from dernkit.kernel import matching
from dernkit.kernel.matching import best_match, best_product, cosines, lengths


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("chunk", [1, 2, 7, 64, 130, None])
def test_chunks_do_not_change_a_bit(chunk: int | None) -> None:
    queries, candidates = normal(130, 33), normal(257, 33, seed=1)
    value, index = best_match(queries, candidates, chunk=130)
    other_value, other_index = best_match(queries, candidates, chunk=chunk)
    assert torch.equal(value, other_value) and torch.equal(index, other_index)


def test_the_order_of_queries_and_candidates_does_not_change_a_bit() -> None:
    queries, candidates = normal(50, 33), normal(257, 33, seed=1)
    value, index = best_match(queries, candidates)
    order, shuffle = torch.randperm(50), torch.randperm(257)
    other_value, other_index = best_match(queries[order], candidates[shuffle])
    assert torch.equal(value[order], other_value) and torch.equal(index[order], shuffle[other_index])


def test_rows_are_the_same_as_a_copy_of_them() -> None:
    queries, candidates, rows = normal(50, 9), normal(20, 9, seed=1), torch.tensor([41, 3, 17])
    for one, other in zip(
        best_match(queries, candidates, rows=rows), best_match(queries[rows], candidates), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("width", [5, 16, 33, 250, 1001])
def test_bitwise_equal_candidates_tie_to_the_lowest_index(width: int) -> None:
    # A matrix product may give equal columns unequal last bits, depending on where they stand.
    candidates = normal(5, 67).repeat(-(-width // 5), 1)[:width]
    _, index = best_match(normal(40, 67, seed=1), candidates, chunk=3)
    assert int(index.max()) < 5


def test_a_copy_has_cosine_exactly_1_and_nothing_more() -> None:
    rows = normal(200, 71) * torch.logspace(-20, 15, 200)[:, None]
    value, index = best_match(rows, rows.flip(0))
    assert torch.equal(value, torch.ones(200)) and torch.equal(index, torch.arange(200).flip(0))
    assert best_match(rows, -rows[:1])[0].min() == -1


def test_zero_vectors_have_cosine_0_with_everything() -> None:
    queries, candidates = normal(3, 5), normal(4, 5, seed=1)
    queries[1] = 0
    value, index = best_match(queries, candidates)
    assert (value[1], index[1]) == (0, 0)
    opposite = -queries[:1].repeat(4, 1)
    opposite[2:] = 0
    value, index = best_match(queries[:1], opposite)
    assert (value[0], index[0]) == (0, 2)
    assert [t.tolist() for t in best_match(torch.zeros(2, 5), torch.zeros(3, 5))] == [[0, 0], [0, 0]]


def test_vectors_that_float32_cannot_normalise_count_as_zero() -> None:
    value, _ = best_match(torch.full((1, 4), 1e-42), torch.ones(2, 4))
    assert value.tolist() == [0]


def test_no_query_has_no_match() -> None:
    value, index = best_match(torch.empty(0, 5), torch.ones(3, 5))
    assert value.shape == index.shape == (0,) and index.dtype == torch.int64


def test_lengths_do_not_depend_on_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = normal(50, 9)
    whole = lengths(rows)
    monkeypatch.setattr(matching, "CACHE", 1)
    assert torch.equal(lengths(rows), whole)
    torch.testing.assert_close(whole, torch.linalg.vector_norm(rows.double(), dim=1))


def test_default_chunk_stays_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    products = []
    close = matching._close
    monkeypatch.setattr(
        matching, "_close", lambda q, c, n: products.append(len(q[0]) * len(c[0]) * 4) or close(q, c, n)
    )
    monkeypatch.setattr(matching, "BUDGET", 4096)
    best_match(normal(100, 3), normal(60, 3))
    assert len(products) > 1 and max(products) <= 4096


def test_all_cosines_do_not_depend_on_the_pieces_and_agree_with_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, candidates = normal(30, 9), normal(20, 9, seed=1)
    queries[3] = candidates[7] = 0
    whole = cosines(queries, candidates)
    assert not whole[3].any() and not whole[:, 7].any()
    assert torch.equal(cosines(queries, queries).diagonal()[:3], torch.ones(3))
    value, index = best_match(queries, candidates)
    torch.testing.assert_close(whole.amax(1), value)
    assert torch.equal(whole.argmax(1), index)
    monkeypatch.setattr(matching, "BUDGET", 8 * 9 * 4)
    torch.testing.assert_close(cosines(queries, candidates), whole, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("chunk", [1, 7, None])
def test_products_of_cosines_are_scored_like_cosines_of_outer_products(chunk: int | None) -> None:
    queries, candidates = (normal(30, 9), normal(30, 4, seed=1)), (normal(20, 9, seed=2), normal(20, 4, seed=3))
    queries[1][3] = candidates[0][7] = candidates[1][8] = 0
    value, index = best_product(queries, candidates, chunk=chunk)
    outer = [(one[:, :, None] * other[:, None]).flatten(1) for one, other in (queries, candidates)]
    expected, expected_index = best_match(outer[0], outer[1])
    torch.testing.assert_close(value, expected)
    assert torch.equal(index, expected_index) and (value[3], index[3]) == (0, 0)
