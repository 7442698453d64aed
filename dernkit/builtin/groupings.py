"""Selectors that group: which experts stay, and to which of them each other expert belongs.

A group may hold experts of several of the router's groups: weights can be averaged whatever a router does. Only the
kept experts must be equally many in each of the router's groups, because it masks whole groups.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float64, Int64
from torch import Tensor

from dernkit.api import ExpertBank, LayerStats, RecipeError, Retention, Similarity, hookimpl
from dernkit.builtin.similarities import Cosine
from dernkit.kernel import calls
from dernkit.kernel.selection import select


@final
@dataclass(frozen=True)
class DominantExpert:
    """The highest scores are dominant; each other expert joins the most similar one. M-SMoE (arXiv 2310.01334).

    The paper scores by routing frequency and compares router logits; how it divides the experts over the layers is the
    recipe's budget here. Ties go to the lowest index.
    """

    name: ClassVar[str] = "dominant-expert"
    groups: ClassVar[bool] = True

    similarity: Similarity = field(default_factory=Cosine)
    """How alike two experts are: the mean affinity over the neurons of the expert that goes."""

    @property
    def requires(self) -> frozenset[str]:
        """What the nested similarity reads."""
        return self.similarity.requires

    def select(self, bank: ExpertBank, scores: Float64[Tensor, " experts"], count: int, stats: LayerStats) -> Retention:
        retention = Retention(scores, select(scores, count, bank.dims.groups))
        nearest = expert_affinities(bank, retention, self.similarity, stats).argmax(dim=1)
        return _grouped(retention, nearest)


@final
@dataclass(frozen=True)
class PseudoPruning:
    """A few big groups around the best experts, most kept experts stay as they are. REAM (arXiv 2604.04356).

    In falling score, each kept expert takes the most similar experts that nobody has taken yet, until its group is
    full (the authors' code, ``pseudo_group``; the paper's own formulas were not at hand). Ties go to the lowest index.
    REAM scores by REAP's saliency and averages two similarities: of mean expert outputs, and of router logits.
    """

    name: ClassVar[str] = "pseudo-pruning"
    groups: ClassVar[bool] = True

    similarity: Similarity = field(default_factory=Cosine)
    """How alike two experts are: the mean affinity over the neurons of the expert that goes."""

    second_similarity: Similarity | None = None
    """If given, experts are compared by the mean of both similarities."""

    group_size: Annotated[int, Interval(ge=2, le=4096)] = 16
    """Experts in a group at most, the kept one included; C in the paper, whose code has this default."""

    @property
    def requires(self) -> frozenset[str]:
        """What the nested similarities read."""
        return frozenset().union(*(similarity.requires for similarity in self._similarities))

    @property
    def _similarities(self) -> tuple[Similarity, ...]:
        return (self.similarity,) if self.second_similarity is None else (self.similarity, self.second_similarity)

    def select(self, bank: ExpertBank, scores: Float64[Tensor, " experts"], count: int, stats: LayerStats) -> Retention:
        experts = bank.dims.experts
        if count * self.group_size < experts:
            raise RecipeError(
                f"selector 'pseudo-pruning', layer {bank.dims.layer}: group_size must be at least "
                f"{-(-experts // count)} for {experts} experts in {count} groups. Got {self.group_size} instead. "
                "Raise it, or keep more experts."
            )
        retention = Retention(scores, select(scores, count, bank.dims.groups))
        found = [expert_affinities(bank, retention, similarity, stats) for similarity in self._similarities]
        ranks = torch.argsort(torch.stack(found).mean(0), dim=0, descending=True, stable=True)
        position = torch.full((len(ranks),), -1, dtype=torch.int64)
        for kept in torch.argsort(scores[retention.kept], descending=True, stable=True).tolist():
            free = ranks[:, kept][position[ranks[:, kept]] < 0]
            position[free[: self.group_size - 1]] = kept
        return _grouped(retention, position)


def expert_affinities(
    bank: ExpertBank, retention: Retention, similarity: Similarity, stats: LayerStats
) -> Float64[Tensor, "dropped kept"]:
    """How alike each dropped expert is to each kept one: the mean over its neurons of their best affinities."""
    kept = retention.kept
    matches = (calls.match(similarity, bank, expert, kept, stats) for expert in retention.dropped)
    rows = [match.affinity.to(torch.float64).mean(dim=0).cpu() for match in matches]
    return torch.stack(rows) if rows else torch.empty(0, len(kept), dtype=torch.float64)


def _grouped(retention: Retention, nearest: Int64[Tensor, " dropped"]) -> Retention:
    """The retention with each dropped expert's position among the kept; the kept ones have their own."""
    group = torch.empty(len(retention.scores), dtype=torch.int64)
    group[retention.kept] = torch.arange(len(retention.kept))
    group[retention.dropped] = nearest
    return Retention(retention.scores, retention.kept, group)


@hookimpl
def dernkit_selectors() -> list[type]:
    return [DominantExpert, PseudoPruning]
