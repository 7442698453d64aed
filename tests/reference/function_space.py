"""Recombination in function space, token by token and neuron by neuron, in float64: the formulas and nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def activation(bank: Any, segment: Tensor, x: Tensor) -> float:
    """``silu(gate · x) (up · x)``, or ``silu(up · x)`` without a gate; a bias is a last feature."""
    parts = [[float(v) for v in part] for part in segment.double()]
    given = [float(v) for v in x.double()] + [1.0]
    dots = [sum(p * v for p, v in zip(part, given, strict=False)) for part in parts[:-1]]
    first = dots[0] / (1 + math.exp(-dots[0]))
    return first if len(dots) == 1 else first * dots[1]


def gram_and_right(hidden: list[list[float]], wanted: list[list[float]]) -> tuple[Tensor, Tensor]:
    """``A_ij = Σ_t h_i h_j`` and ``B_ic = Σ_t h_i y_c``."""
    neurons, size = len(hidden[0]), len(wanted[0])
    gram = torch.zeros(neurons, neurons, dtype=torch.float64)
    right = torch.zeros(neurons, size, dtype=torch.float64)
    for h, y in zip(hidden, wanted, strict=True):
        for i in range(neurons):
            for j in range(neurons):
                gram[i, j] += h[i] * h[j]
            for c in range(size):
                right[i, c] += h[i] * y[c]
    return gram, right


def left_out_errors(hidden: Tensor, wanted: Tensor, part: list[int], ridges: Sequence[float]) -> dict[float, float]:
    """By ridge: the squared error on each part of what was solved on the others, with one λ for all of them."""
    h, y = hidden.double(), wanted.double()
    mean = float(h.square().sum(0).mean())
    errors = {}
    for ridge in ridges:
        errors[ridge] = 0.0
        for left_out in set(part):
            inside = torch.tensor([number != left_out for number in part])
            rows = torch.cat([h[inside], (ridge * mean) ** 0.5 * torch.eye(h.shape[1], dtype=torch.float64)])
            target = torch.cat([y[inside], torch.zeros(h.shape[1], y.shape[1], dtype=torch.float64)])
            weights = torch.linalg.lstsq(rows, target).solution
            errors[ridge] += float((h[~inside] @ weights - y[~inside]).square().sum())
    return errors


def damped_error(gram: Tensor, right: Tensor, damping: float, chosen: Sequence[int]) -> float:
    """``min_D Σ_t ‖y − D h‖² + λ ‖D‖²`` over the chosen neurons, less ``Σ ‖y‖²``."""
    some = list(chosen)
    a = gram[some][:, some] + damping * torch.eye(len(some), dtype=torch.float64)
    b = right[some]
    return -float((b * torch.linalg.solve(a, b)).sum())


def saliencies(gram: Tensor, right: Tensor, damping: float, left: Sequence[int]) -> list[float]:
    """What the damped error rises by when one neuron goes: computed by solving without it, not by the formula."""
    whole = damped_error(gram, right, damping, left)
    return [damped_error(gram, right, damping, [i for i in left if i != gone]) - whole for gone in left]


def eliminate(gram: Tensor, right: Tensor, damping: float, count: int, rounds: int) -> list[int]:
    """In each round the least salient go one by one, out of twice as many that were least salient at its beginning."""
    left = list(range(len(gram)))
    for number in range(rounds, 0, -1):
        if len(left) <= count:
            break
        size = count if number == 1 else max(count, round(len(left) * (count / len(left)) ** (1 / number)))
        found = saliencies(gram, right, damping, left)
        ranked = [left[place] for place in sorted(range(len(left)), key=lambda place: found[place])]
        candidates = set(ranked[: 2 * (len(left) - size)])
        while len(left) > size:
            now = dict(zip(left, saliencies(gram, right, damping, left), strict=True))
            left.remove(min((neuron for neuron in left if neuron in candidates), key=lambda neuron: now[neuron]))
    return left


def objective(bank: Any, after: Any, inputs: Tensor, before: Any, now: Any, down: Tensor, ridge: float) -> float:
    """``Σ_t ‖Y − Σ_r g_r D_r φ_r‖² + Σ_r λ_r ‖D_r − D⁰_r‖²`` for experts without down biases."""
    total = 0.0
    diagonal = torch.zeros(len(down), down.shape[2], dtype=torch.float64)
    for t in range(len(inputs)):
        wanted = torch.zeros(down.shape[1], dtype=torch.float64)
        for slot, expert in enumerate(before.chosen[t].tolist()):
            for segment in bank.segments(expert):
                phi = activation(bank, segment, inputs[t])
                wanted += float(before.coefficients[t, slot]) * phi * segment[-1, : len(wanted)].double()
        for slot, expert in enumerate(now.chosen[t].tolist()):
            for i, segment in enumerate(after.segments(expert)):
                h = float(now.coefficients[t, slot]) * activation(bank, segment, inputs[t])
                diagonal[expert, i] += h * h
                wanted -= h * down[expert, :, i].double()
        total += float(wanted.square().sum())
    for expert in range(len(down)):
        change = (down[expert].double() - after.down[expert].double()).square().sum()
        mean = float(diagonal[expert].mean())
        total += (ridge * mean if mean > 0 else 1.0) * float(change)
    return total


def refit_loss(
    bank: Any, inputs: Tensor, before: Any, now: Any, kept: Sequence[int], second: Sequence[bool], ridge: float
) -> float:
    """Projections of the experts in turn, most weight first, fitted to what is left of the output on the first half."""
    size = bank.down.shape[1]

    def features(expert: int, t: int, coefficient: float) -> Tensor:
        values = [coefficient * activation(bank, segment, inputs[t]) for segment in bank.segments(expert)]
        return torch.tensor(values, dtype=torch.float64)

    used: dict[int, dict[int, Tensor]] = {expert: {} for expert in kept}
    weight = dict.fromkeys(kept, 0.0)
    residual = torch.zeros(len(inputs), size, dtype=torch.float64)
    for t in range(len(inputs)):
        for expert, c in zip(before.chosen[t].tolist(), before.coefficients[t].tolist(), strict=True):
            residual[t] += features(expert, t, c) @ bank.segments(expert)[:, -1, :size].double()
        for expert, c in zip(now.chosen[t].tolist(), now.coefficients[t].tolist(), strict=True):
            used[expert][t] = features(expert, t, c)
            weight[expert] += c
            residual[t] -= used[expert][t] @ bank.segments(expert)[:, -1, :size].double()
    for expert in sorted(kept, key=lambda expert: -weight[expert]):
        tokens = list(used[expert])
        fitted = [t for t in tokens if not second[t]]
        for t in tokens:
            residual[t] += used[expert][t] @ bank.segments(expert)[:, -1, :size].double()
        h = torch.stack([used[expert][t] for t in fitted])
        mean = float(h.square().sum(0).mean())
        gram = h.T @ h + ridge * mean * torch.eye(h.shape[1], dtype=torch.float64)
        down = torch.linalg.solve(gram, h.T @ torch.stack([residual[t] for t in fitted]))
        for t in tokens:
            residual[t] -= used[expert][t] @ down
    return float(residual[torch.tensor(second)].square().sum())
