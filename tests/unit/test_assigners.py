from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dernkit.api import Match
from dernkit.builtin.assigners import Affinity, NoMoves
from dernkit.testing.banks import random_bank, random_stats, retained
from dernkit.types import ExpertBank, LayerStats

BANK = random_bank(4, 3, 2, layer=7)
STATS = random_stats(BANK)
RETAINED = retained(BANK, [0, 2])


@dataclass(frozen=True)
class Table:
    """A similarity whose affinities are written down: one row per dropped segment, one column per kept expert."""

    rows: tuple
    name: ClassVar[str] = "table"
    requires: ClassVar[frozenset[str]] = frozenset({"routed"})

    def match(self, bank: ExpertBank, dropped: int, kept: torch.Tensor, stats: LayerStats) -> Match:
        assert set(stats.values) == {"routed"}
        width = bank.dims.width
        start = (dropped // 2) * width
        affinity = torch.tensor(self.rows)[start : start + width]
        return Match(affinity, torch.arange(affinity.numel()).view(affinity.shape) % width)


TABLE = Table(((0.9, 0.1), (0.6, 0.6), (0.1, 0.7), (0.2, 0.3), (0.6, 0.7), (0.61, -0.5)))


def test_none_moves_nothing() -> None:
    assert len(NoMoves().assign(BANK, RETAINED, STATS)) == 0


def test_a_segment_moves_if_and_only_if_it_is_strictly_above_the_threshold() -> None:
    moves = Affinity(similarity=TABLE, threshold=0.6).assign(BANK, RETAINED, STATS)
    assert moves.source.tolist() == [3, 5, 10, 11]
    assert moves.target.tolist() == [0, 1, 1, 0]
    assert moves.partner.tolist() == [0, 2, 0, 1]
    assert moves.affinity.tolist() == pytest.approx([0.9, 0.7, 0.7, 0.61])


def test_the_default_is_the_threshold_of_the_paper() -> None:
    default, explicit = (
        Affinity(similarity=TABLE, **o).assign(BANK, RETAINED, STATS) for o in ({}, {"threshold": 0.6})
    )
    assert default.source.tolist() == explicit.source.tolist()


def test_ties_between_kept_experts_go_to_the_first() -> None:
    moves = Affinity(similarity=TABLE, threshold=0.5).assign(BANK, RETAINED, STATS)
    assert dict(zip(moves.source.tolist(), moves.target.tolist(), strict=True))[4] == 0


@pytest.mark.parametrize(
    ("quantile", "sources"),
    [(0.0, []), (0.16, []), (0.17, [3]), (0.34, [3, 5]), (0.5, [3, 5, 10]), (1.0, [3, 4, 5, 9, 10, 11])],
)
def test_quantile_moves_the_best_share_and_breaks_ties_to_the_lowest_source(quantile: float, sources: list) -> None:
    assert Affinity(similarity=TABLE, quantile=quantile).assign(BANK, RETAINED, STATS).source.tolist() == sources


def test_quantile_is_exact_on_the_decimal_that_was_written() -> None:
    bank = random_bank(2, 100, 2)
    assert int(0.29 * 100) == 28
    assert len(Affinity(quantile=0.29).assign(bank, retained(bank, [0]), LayerStats(0))) == 29


def test_a_threshold_of_1_moves_nothing_even_between_twins() -> None:
    bank = random_bank(2, 5, 3)
    bank.up[1], bank.down[1] = bank.up[0], bank.down[0]
    assert len(Affinity(threshold=1.0).assign(bank, retained(bank, [0]), LayerStats(0))) == 0
    assert len(Affinity(threshold=0.999).assign(bank, retained(bank, [0]), LayerStats(0))) == 5


def test_only_one_rule_may_be_given() -> None:
    with pytest.raises(ValueError, match="threshold and quantile: only one of the two may be given"):
        Affinity(threshold=0.5, quantile=0.5)


def test_an_assigner_requires_what_its_similarity_requires() -> None:
    assert Affinity(similarity=TABLE).requires == {"routed"}
    assert Affinity().requires == frozenset()


def test_nothing_dropped_moves_nothing() -> None:
    assert len(Affinity(quantile=1.0).assign(BANK, retained(BANK, [0, 1, 2, 3]), STATS)) == 0
