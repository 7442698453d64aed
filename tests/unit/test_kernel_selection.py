import pytest
import torch

from dernkit.errors import CheckpointError, RecipeError
from dernkit.kernel.selection import kept_count, limits, select
from dernkit.types import LayerDims

EIGHT = limits(LayerDims(layer=3, experts=8, top_k=2, width=4, hidden=4))
GROUPED = limits(LayerDims(0, 256, 8, 4, 4, groups=8, top_k_groups=4, candidates_per_group=2))


def scores(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_select_keeps_the_highest_in_ascending_order() -> None:
    assert select(scores(0.1, 0.9, 0.5, 0.7), 2).tolist() == [1, 3]


def test_select_breaks_ties_to_the_lowest_index() -> None:
    assert select(torch.zeros(100, dtype=torch.float64), 3).tolist() == [0, 1, 2]
    assert select(scores(1, 2, 2, 2), 2).tolist() == [1, 2]


def test_select_takes_the_same_number_from_every_group() -> None:
    assert select(scores(9, 8, 7, 6, 1, 2, 3, 4), 4, groups=2).tolist() == [0, 1, 6, 7]


def test_select_refuses_a_count_that_groups_cannot_share() -> None:
    with pytest.raises(ValueError, match="multiple of the 2 groups"):
        select(scores(1, 2, 3, 4), 3, groups=2)


def test_limits_follow_the_router() -> None:
    assert (EIGHT.smallest, EIGHT.multiple) == (2, 1)
    assert (GROUPED.smallest, GROUPED.multiple) == (16, 8)


@pytest.mark.parametrize(
    ("keep", "count"), [(0.5, 4), (1.0, 8), (8, 8), (2, 2), (0.25, 2), (0.3125, 3), (0.3124, 2), (0.9375, 8)]
)
def test_keep_is_a_fraction_or_a_count(keep: int | float, count: int) -> None:
    assert kept_count(keep, EIGHT) == count


def test_half_is_rounded_up_as_it_is_written() -> None:
    hundred = limits(LayerDims(0, 100, 1, 4, 4))
    assert 0.145 * 100 < 14.5
    assert kept_count(0.145, hundred) == 15


@pytest.mark.parametrize("keep", [True, False, 0, -1, 0.0, -0.5, 1.5, float("nan"), float("inf")])
def test_keep_that_is_neither_is_a_recipe_error(keep: int | float) -> None:
    with pytest.raises(RecipeError, match=r"keep: must be a fraction .* Got .* instead\."):
        kept_count(keep, EIGHT)


@pytest.mark.parametrize(
    ("keep", "sentence"),
    [
        (
            1,
            "keep, layer 3: must be from 2 (what the router's top-k needs) to 8 of 8 experts. Got 1 instead. Use 2.",
        ),
        (
            0.1,
            "keep, layer 3: must be from 2 (what the router's top-k needs) to 8 of 8 experts. "
            "Got 0.1 (1 of 8) instead. Use 2.",
        ),
        (9, "keep, layer 3: must be from 2 (what the router's top-k needs) to 8 of 8 experts. Got 9 instead. Use 8."),
    ],
)
def test_counts_that_the_router_cannot_work_with(keep: int | float, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        kept_count(keep, EIGHT)
    assert str(caught.value) == sentence


@pytest.mark.parametrize(("keep", "fix"), [(100, "Use 96 or 104."), (0.3, "Use 72 or 80."), (8, "Use 16.")])
def test_counts_that_groups_cannot_share_name_the_nearest(keep: int | float, fix: str) -> None:
    with pytest.raises(CheckpointError, match=r"in steps of 8 \(the router's groups\)") as caught:
        kept_count(keep, GROUPED)
    assert str(caught.value).endswith(fix)
