import torch

from dernkit.builtin.routers import Additive, Slice
from dernkit.kernel.compress import NO_STATISTICS
from dernkit.types import Assignment, LayerPlan

ROWS = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
KEPT = torch.tensor([1, 2])


def plan(source: list[int], target: list[int]) -> LayerPlan:
    index = torch.tensor(source, dtype=torch.int64)
    moves = Assignment(index, torch.tensor(target, dtype=torch.int64), index % 5, torch.ones(len(source)))
    return LayerPlan(0, 4, 5, torch.ones(4, dtype=torch.float64), KEPT, moves)


def test_slice_keeps_rows() -> None:
    assert torch.equal(Slice().update(ROWS, plan([0], [0]), NO_STATISTICS), ROWS[KEPT])


def test_additive_adds_the_share_of_moved_segments_of_the_original_rows() -> None:
    new = Additive().update(ROWS, plan([0, 1, 15, 16, 17], [0, 0, 0, 0, 0]), NO_STATISTICS)
    torch.testing.assert_close(new[0], ROWS[1] + 2 / 5 * ROWS[0] + 3 / 5 * ROWS[3])


def test_additive_leaves_rows_without_arrivals_bitwise_alone() -> None:
    before = ROWS.clone()
    assert torch.equal(Additive().update(ROWS, plan([0], [0]), NO_STATISTICS)[1], ROWS[2])
    assert torch.equal(Additive().update(ROWS, plan([], []), NO_STATISTICS), ROWS[KEPT])
    assert torch.equal(ROWS, before)
