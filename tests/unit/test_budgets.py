import pytest
import torch

from dernkit.api import KeepLimits
from dernkit.builtin.budgets import Uniform
from dernkit.errors import CheckpointError

SCORES = [torch.arange(8, dtype=torch.float64)] * 2


@pytest.mark.parametrize(("keep", "counts"), [(0.5, [4, 8]), (4, [4, 4]), (1.0, [8, 16])])
def test_uniform_keeps_the_same_share_or_count_in_every_layer(keep: int | float, counts: list[int]) -> None:
    assert Uniform().allocate(SCORES, keep, [KeepLimits(0, 8, 2, 1), KeepLimits(1, 16, 2, 1)]) == counts


def test_uniform_names_the_layer_that_does_not_allow_it() -> None:
    with pytest.raises(CheckpointError, match="layer 1: must be from 6"):
        Uniform().allocate(SCORES, 4, [KeepLimits(0, 8, 2, 1), KeepLimits(1, 8, 6, 1)])
