"""Scores formula by formula: Python loops and float64, nothing clever. The fast code must match them.

A vector is a list of floats. A token is what one row of the sample holds; a route says whom a token takes, with which
coefficients, when only some experts are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

from dernkit.types import ExpertBank

Vector = list[float]
Event = tuple[int, float, float]
"""One routed expert of one token: its index, its coefficient g, the norm of its output."""
Choices = list[tuple[int, float]]
Route = Callable[[Vector, Sequence[int]], Choices]


def mean(terms: Sequence[float], count: int) -> float:
    return math.fsum(terms) / count if count else 0.0


def per_expert(tokens: Sequence[Sequence[Event]], experts: int) -> list[list[tuple[float, float]]]:
    """(g, ‖E_e(x)‖) of every token routed to each expert."""
    return [[(g, n) for token in tokens for i, g, n in token if i == e] for e in range(experts)]


def gate_mass(tokens: Sequence[Sequence[Event]], experts: int, normalise: str) -> Vector:
    """Mean of g_e over all or routed tokens."""
    return [
        mean([g for g, _ in seen], len(tokens) if normalise == "all" else len(seen))
        for seen in per_expert(tokens, experts)
    ]


def ean(tokens: Sequence[Sequence[Event]], experts: int) -> Vector:
    """Σ ‖E_e(x)‖"""
    return [math.fsum(n for _, n in seen) for seen in per_expert(tokens, experts)]


def activation_mean(tokens: Sequence[Sequence[Event]], experts: int, power: int, normalise: str) -> Vector:
    """Mean of ‖E_e(x)‖ or ‖E_e(x)‖² (MAN, MSAN)."""
    return [
        mean([n**power for _, n in seen], len(tokens) if normalise == "all" else len(seen))
        for seen in per_expert(tokens, experts)
    ]


def reap(tokens: Sequence[Sequence[Event]], experts: int, normalise: str) -> Vector:
    """Mean of g_e ‖E_e(x)‖."""
    return [
        mean([g * n for g, n in seen], len(tokens) if normalise == "all" else len(seen))
        for seen in per_expert(tokens, experts)
    ]


def matrices(bank: ExpertBank, expert: int, parts: Sequence[str]) -> Vector:
    """All entries of an expert's matrices."""
    tensors = {"gate": bank.gate, "up": bank.up, "down": bank.down}
    return [float(x) for part in parts for row in tensors[part][expert].double().tolist() for x in row]


def weight_norm(bank: ExpertBank, parts: Sequence[str]) -> Vector:
    return [math.sqrt(math.fsum(w * w for w in matrices(bank, e, parts))) for e in range(bank.dims.experts)]


def aimer(bank: ExpertBank, parts: Sequence[str]) -> Vector:
    """1 − P / √(N Q), with the sum P of absolute values, the sum Q of squares and the number N of weights."""
    scores = []
    for expert in range(bank.dims.experts):
        weights = matrices(bank, expert, parts)
        absolute, square = math.fsum(map(abs, weights)), math.fsum(w * w for w in weights)
        scores.append(1 - absolute / math.sqrt(len(weights) * square) if square else 0.0)
    return scores


def dot(u: Vector, v: Vector) -> float:
    return math.fsum(x * y for x, y in zip(u, v, strict=True))


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def expert_output(bank: ExpertBank, expert: int, x: Vector) -> Vector:
    """``W_down (silu(W_gate x + b) ⊙ (W_up x + b)) + b``, neuron by neuron."""

    def row(weight: object, bias: object, neuron: int) -> float:
        offset = 0.0 if bias is None else float(bias[expert, neuron])
        return dot(weight[expert, neuron].double().tolist(), x) + offset

    down = bank.down[expert].double()
    out = [0.0] * len(x) if bank.down_bias is None else bank.down_bias[expert].double().tolist()
    for neuron in range(bank.dims.width):
        up = row(bank.up, bank.up_bias, neuron)
        act = silu(up) if bank.gate is None else silu(row(bank.gate, bank.gate_bias, neuron)) * up
        out = [o + w * act for o, w in zip(out, down[:, neuron].tolist(), strict=True)]
    return out


def softmax_route(rows: Sequence[Vector], bias: Vector, top_k: int, *, renormalise: bool) -> Route:
    """The top-k of a softmax, over the chosen ones or over all that are left."""

    def route(x: Vector, left: Sequence[int]) -> Choices:
        logits = {e: dot(rows[e], x) + bias[e] for e in left}
        chosen = sorted(left, key=lambda e: (-logits[e], e))[:top_k]
        among = chosen if renormalise else left
        largest = max(logits.values())
        total = math.fsum(math.exp(logits[e] - largest) for e in among)
        return [(e, math.exp(logits[e] - largest) / total) for e in chosen]

    return route


def layer_output(bank: ExpertBank, x: Vector, choices: Choices) -> Vector:
    total = [0.0] * len(x)
    for expert, g in choices:
        if bank.coefficient_on_input:
            added = expert_output(bank, expert, [g * value for value in x])
        else:
            added = [g * value for value in expert_output(bank, expert, x)]
        total = [t + a for t, a in zip(total, added, strict=True)]
    return total


def loss(bank: ExpertBank, tokens: Sequence[Vector], route: Route, left: Sequence[int]) -> float:
    """Σ_t ‖Y(x_t) − Y_S(x_t)‖² / Σ_t ‖Y(x_t)‖²"""
    wrong, energy = [], []
    for x in tokens:
        whole = layer_output(bank, x, route(x, range(bank.dims.experts)))
        part = layer_output(bank, x, route(x, left))
        wrong += [(a - b) ** 2 for a, b in zip(whole, part, strict=True)]
        energy += [a * a for a in whole]
    return math.fsum(wrong) / math.fsum(energy)


def leave_one_out(bank: ExpertBank, tokens: Sequence[Vector], route: Route) -> Vector:
    everyone = range(bank.dims.experts)
    return [loss(bank, tokens, route, [e for e in everyone if e != gone]) for gone in everyone]


def backward(bank: ExpertBank, tokens: Sequence[Vector], route: Route, count: int) -> list[tuple[int, float]]:
    """Who goes, in order, with the loss of those that are then left; groups take turns."""
    size = bank.dims.experts // bank.dims.groups
    left, gone = list(range(bank.dims.experts)), []
    while len(left) > count:
        sizes = [len([e for e in left if e // size == group]) for group in range(bank.dims.groups)]
        trials = [
            (loss(bank, tokens, route, [other for other in left if other != e]), -e)
            for e in left
            if sizes[e // size] == max(sizes)
        ]
        cost, negative = min(trials)
        left.remove(-negative)
        gone.append((-negative, cost))
    return gone


def best_subset(bank: ExpertBank, tokens: Sequence[Vector], route: Route, count: int) -> list[int]:
    """Every subset with as many of each group, the first of the best."""
    dims, size = bank.dims, bank.dims.experts // bank.dims.groups
    best: tuple[float, tuple[int, ...]] | None = None
    for subset in combinations(range(dims.experts), count):
        members = [len([e for e in subset if e // size == group]) for group in range(dims.groups)]
        if len(set(members)) == 1:
            found = (loss(bank, tokens, route, subset), subset)
            best = found if best is None else min(best, found)
    return list(best[1])


def ranked_choice(bank: ExpertBank, tokens: Sequence[Vector], route: Route, ballot: str) -> list[int]:
    """Who goes, in order: fewest votes, then smallest sum of coefficients, then highest index; groups take turns."""
    size = bank.dims.experts // bank.dims.groups
    left, gone = list(range(bank.dims.experts)), []
    while len(left) > bank.dims.smallest_keep:
        votes: dict[int, list[float]] = {e: [] for e in left}
        for x in tokens:
            choices = sorted(route(x, left), key=lambda choice: -choice[1])
            for expert, g in choices[: 1 if ballot == "first" else None]:
                votes[expert].append(g)
        sizes = [len([e for e in left if e // size == group]) for group in range(bank.dims.groups)]
        trials = [(len(votes[e]), math.fsum(votes[e]), -e) for e in left if sizes[e // size] == max(sizes)]
        left.remove(-min(trials)[2])
        gone.append(-min(trials)[2])
    return gone


def super_experts(bank: ExpertBank, tokens: Sequence[Vector], route: Route, factor: float) -> list[int]:
    """Whose largest absolute output is above ``factor`` times the median of the others'."""
    everyone = range(bank.dims.experts)
    peaks: dict[int, float] = {}
    for x in tokens:
        for expert, _ in route(x, everyone):
            peaks[expert] = max(peaks.get(expert, 0.0), *map(abs, expert_output(bank, expert, x)))
    found = []
    for expert, peak in peaks.items():
        others = sorted(other for e, other in peaks.items() if e != expert)
        if others:
            middle = (others[(len(others) - 1) // 2] + others[len(others) // 2]) / 2
            found += [expert] * (peak > factor * middle)
    return sorted(found)
