"""How scores and kept sets change as calibration tokens grow: statistics are sums, so one pass gives all sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata
from torch import Tensor

from dernkit.api import Block, Scorer
from dernkit.compare.cells import Growth
from dernkit.kernel import calls
from dernkit.kernel.selection import fewest, limits, select
from dernkit.progress import Silent
from dernkit.stages.calibrate import batched, calibrate_live
from dernkit.types import LayerStats


def grow(model: Any, blocks: Sequence[Block], tokens: Tensor, growth: Growth) -> list[dict[str, Any]]:
    """One point for each scorer, layer and share of the tokens, against all tokens.

    Args:
        model: in its own dtype.
        blocks: its MoE blocks.
        tokens: all calibration tokens [sequences, length]; a share is of their sequences, one at least.
        growth: what is asked for.

    Returns:
        Plain data: ``tokens``; ``overlap``, the share of the experts with the best scores by all tokens that are also
        those with the best scores by these; ``spearman``, the rank correlation of the scores. Both are 1 at the end.
    """
    parts = list(_growing(model, blocks, tokens, growth))
    points: list[dict[str, Any]] = []
    for scorer in growth.scorers:
        for block in blocks:
            found = [(seen, _scores(block, scorer, stats[block.layer])) for seen, stats in parts]
            for seen, scores in found:
                points.append(_place(growth, scorer, block, seen) | _agreement(scores, found[-1][1], block, growth))
    return points


def _growing(
    model: Any, blocks: Sequence[Block], tokens: Tensor, growth: Growth
) -> Iterator[tuple[int, dict[int, LayerStats]]]:
    """Tokens so far and their statistics, for every share."""
    spec, context = growth.context.spec, growth.context
    assert spec is not None
    ends = sorted({max(1, round(share * len(tokens))) for share in growth.shares})
    total: dict[int, LayerStats] = {}
    for start, end in zip([0, *ends], ends, strict=False):
        found = calibrate_live(
            model,
            blocks,
            batched(tokens[start:end], spec.batch_size),
            growth.requires,
            sample_size=spec.sample,
            seed=context.seed,
            progress=Silent(),
            first_token=start * tokens.shape[1],
        )
        total = {layer: total[layer] + stats if total else stats for layer, stats in found.items()}
        yield end * tokens.shape[1], total


def _scores(block: Block, scorer: Scorer, stats: LayerStats) -> Tensor:
    return calls.score(scorer, block.bank(), stats)


def _place(growth: Growth, scorer: Scorer, block: Block, tokens: int) -> dict[str, Any]:
    context = growth.context
    return {
        "model": context.subject.name,
        "calibration": context.calibration,
        "scorer": scorer.name,
        "seed": context.seed,
        "layer": block.layer,
        "tokens": tokens,
    }


def _agreement(scores: Tensor, whole: Tensor, block: Block, growth: Growth) -> dict[str, float]:
    count = fewest(limits(block.dims), growth.keep)
    kept, final = (set(select(each, count, block.dims.groups).tolist()) for each in (scores, whole))
    return {"keep": growth.keep, "overlap": len(kept & final) / count, "spearman": _spearman(scores, whole)}


def _spearman(one: Tensor, other: Tensor) -> float:
    """Rank correlation; where all scores of one are equal, 1 if those of the other are too, and else 0."""
    ranks = rankdata(one.numpy()), rankdata(other.numpy())
    if np.array_equal(*ranks):
        return 1.0
    if any(np.ptp(each) == 0 for each in ranks):
        return 0.0
    return float(np.corrcoef(*ranks)[0, 1])
