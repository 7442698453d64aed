"""Every calibration statistic of one MoE block by float64 loops over tokens, from the papers' formulas.

Inputs are what the block saw; the router is written again from each family's published definition.
"""

from __future__ import annotations

import math
from typing import Any

import torch


def choices(config: Any, router: Any, x: torch.Tensor) -> list[tuple[int, float]]:
    """Experts that one token takes, with the coefficient of each expert's output."""
    logits = [float(row.double() @ x) for row in router.weight]
    family = config.model_type
    if family == "deepseek_v3":
        return _deepseek_v3(config, router, logits)
    largest = max(logits)
    exps = [math.exp(logit - largest) for logit in logits]
    probabilities = [value / sum(exps) for value in exps]
    allowed = set(range(len(logits)))
    if family == "deepseek_v2" and config.topk_method == "group_limited_greedy":
        allowed = _allowed(config, probabilities, members=1)
    best = sorted(allowed, key=lambda e: (-probabilities[e], e))[: config.num_experts_per_tok]
    weights = [probabilities[e] for e in best]
    if family == "mixtral" or (getattr(config, "norm_topk_prob", False) and family != "deepseek_v2"):
        weights = [weight / sum(weights) for weight in weights]
    scale = config.routed_scaling_factor if family == "deepseek_v2" else 1.0
    return [(e, weight * scale) for e, weight in zip(best, weights, strict=True)]


def _deepseek_v3(config: Any, router: Any, logits: list[float]) -> list[tuple[int, float]]:
    scores = [1 / (1 + math.exp(-logit)) for logit in logits]
    corrected = [score + float(bias) for score, bias in zip(scores, router.e_score_correction_bias, strict=True)]
    allowed = _allowed(config, corrected, members=2)
    best = sorted(allowed, key=lambda e: (-corrected[e], e))[: config.num_experts_per_tok]
    weights = [scores[e] for e in best]
    if config.norm_topk_prob:
        weights = [weight / (sum(weights) + 1e-20) for weight in weights]
    return [(e, weight * config.routed_scaling_factor) for e, weight in zip(best, weights, strict=True)]


def _allowed(config: Any, scores: list[float], members: int) -> set[int]:
    """Experts of the ``topk_group`` groups whose best ``members`` experts score highest together."""
    size = len(scores) // config.n_group
    groups = [list(range(g * size, (g + 1) * size)) for g in range(config.n_group)]
    totals = [sum(sorted((scores[e] for e in group), reverse=True)[:members]) for group in groups]
    best = sorted(range(len(groups)), key=lambda g: (-totals[g], g))[: config.topk_group]
    return {expert for g in best for expert in groups[g]}


def expert_output(experts: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """``W_down (silu(W_gate x) ⊙ (W_up x))``, neuron by neuron."""
    width = experts.down_proj.shape[2]
    rows = experts.gate_up_proj[expert].double()
    output = torch.zeros(experts.down_proj.shape[1], dtype=torch.float64)
    for neuron in range(width):
        gate, up = float(rows[neuron] @ x), float(rows[width + neuron] @ x)
        output += experts.down_proj[expert].double()[:, neuron] * (gate / (1 + math.exp(-gate)) * up)
    return output


def statistics(config: Any, block: Any, inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """All sums over the tokens ``inputs`` [n, H]."""
    experts = len(block.gate.weight)
    sums = {
        name: torch.zeros(experts, dtype=torch.float64)
        for name in ("routed", "gate_sum", "output_norm_sum", "output_sq_sum", "reap_sum")
    }
    sums["output_sum"] = torch.zeros(experts, inputs.shape[1], dtype=torch.float64)
    for x in inputs.double():
        for expert, coefficient in choices(config, block.gate, x):
            output = expert_output(block.experts, expert, x)
            norm = float(output.norm())
            sums["routed"][expert] += 1
            sums["gate_sum"][expert] += coefficient
            sums["output_norm_sum"][expert] += norm
            sums["output_sq_sum"][expert] += norm**2
            sums["reap_sum"][expert] += coefficient * norm
            sums["output_sum"][expert] += output
    return sums
