"""Laws of scorers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dernkit.testing.banks import permute_experts, permute_neurons, permute_stats
from dernkit.testing.cases import Case, cases, expert_order, neuron_order, unequal
from dernkit.testing.law import Check, require
from dernkit.types import LayerStats

TOLERANCE = 1e-5
"""Of float32 sums in another order, relative to the largest score."""


def shape(scorer: Any, case: Case) -> None:
    """Scores are a tensor [E], one for each expert."""
    scores, experts = scorer.score(case.bank, case.stats), case.bank.dims.experts
    got = list(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
    require(got == [experts], f"return a tensor of shape [{experts}]", got, "Sum over all dimensions but the experts'.")


def dtype(scorer: Any, case: Case) -> None:
    """Scores are float64."""
    found = scorer.score(case.bank, case.stats).dtype
    require(found == torch.float64, "return float64 scores", found, "Cast statistics and sums to float64.")


def expert_permutation(scorer: Any, case: Case) -> None:
    """Experts in another order have the same scores in that order."""
    order = expert_order(case.bank)
    expected = scorer.score(case.bank, case.stats)[order]
    found = scorer.score(permute_experts(case.bank, order), permute_stats(case.stats, order))
    _close(found, expected, "give every expert the same score in any order of the experts", "Use no expert's number.")


def neuron_permutation(scorer: Any, case: Case) -> None:
    """Neurons in another order change no score."""
    bank = case.bank
    for expert in range(bank.dims.experts):
        bank = permute_neurons(bank, expert, neuron_order(bank.dims.width, expert))
    must = "give the same scores for any order of an expert's neurons"
    _close(scorer.score(bank, case.stats), scorer.score(case.bank, case.stats), must, "Use no neuron's number.")


def repeated_tokens(scorer: Any, case: Case) -> None:
    """Calibrating on the same text twice does not change which experts score higher."""
    once = replace(case.stats, sample_size=2 * case.stats.sample_size)
    before, after = scorer.score(case.bank, once), scorer.score(case.bank, once + once)
    above = before[:, None] - before[None, :] > TOLERANCE * before.abs().max()
    turned = (above & (after[:, None] < after[None, :])).nonzero().tolist()
    require(
        not turned,
        "rank experts alike when the same tokens are seen twice",
        lambda: f"expert {turned[0][0]} above expert {turned[0][1]} once, below it twice",
        "Let every statistic count in proportion to the tokens.",
    )


def no_tokens(scorer: Any, case: Case) -> None:
    """Where calibration saw no token, scores are still finite."""
    values = {name: value if "sample" in name else torch.zeros_like(value) for name, value in case.stats.values.items()}
    scores = scorer.score(case.bank, LayerStats(0, values, case.stats.sample_size))
    require(
        bool(scores.isfinite().all()),
        "return finite scores where there were no tokens",
        lambda: str(scores[~scores.isfinite()][0].item()),
        "Divide by `max(stats.tokens, 1)` and by `routed.clamp(min=1)`.",
    )


def _close(found: Tensor, expected: Tensor, must: str, fix: str) -> None:
    distance = (found - expected).abs()
    scale = max(float(expected.abs().max()), 1e-12)
    worst = int(distance.argmax())
    got = f"{found[worst].item():.6g} for {expected[worst].item():.6g}"
    require(float(distance.max()) <= TOLERANCE * scale, must, got, fix)


def laws() -> list[Check]:
    """Of scorers."""
    return [
        Check("scorer", shape, cases),
        Check("scorer", dtype, cases),
        Check("scorer", expert_permutation, unequal),
        Check("scorer", neuron_permutation, unequal),
        Check("scorer", repeated_tokens, unequal),
        Check("scorer", no_tokens, cases),
    ]
