"""What evaluators measure on text, token by token in float64, from the formulas."""

from __future__ import annotations

import math
from collections.abc import Sequence

Row = Sequence[float]


def log_softmax(logits: Row) -> list[float]:
    top = max(logits)
    total = math.log(math.fsum(math.exp(value - top) for value in logits))
    return [value - top - total for value in logits]


def nats(logits: Sequence[Row], ids: Sequence[int], first: int) -> float:
    """Loss of the tokens from ``first`` on; the logits at t are about the token at t + 1."""
    return math.fsum(-log_softmax(logits[t - 1])[ids[t]] for t in range(max(first, 1), len(ids)))


def kl(original: Sequence[Row], compressed: Sequence[Row], first: int) -> float:
    """Sum over the same places of KL(original || compressed)."""
    total = 0.0
    for t in range(max(first, 1), len(original)):
        p, q = log_softmax(original[t - 1]), log_softmax(compressed[t - 1])
        for a, b in zip(p, q, strict=True):
            if a > -math.inf:
                total += math.exp(a) * (a - b)
    return total


def agreement(original: Sequence[Row], compressed: Sequence[Row], first: int) -> int:
    """At how many places both have the same most likely token, the first of equals."""
    count = 0
    for t in range(max(first, 1), len(original)):
        a, b = list(original[t - 1]), list(compressed[t - 1])
        count += a.index(max(a)) == b.index(max(b))
    return count


def window_places(tokens: int, length: int, stride: int) -> list[tuple[int, int, int]]:
    """(start, first scored token, end) of every window that scores one."""
    found, done = [], 1
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        if end > done:
            found.append((start, done, end))
            done = end
        if end == tokens:
            break
    return found


def token_bytes(ends: Sequence[int], text: str) -> list[float]:
    """Bytes of each token: those since the last token that ended earlier, shared by all that end at the same place."""
    highest, reached = 0, []
    for end in ends:
        highest = max(highest, end)
        reached.append(highest)
    places = [len(text) if end == highest else end for end in reached]
    first = min(end for end in places if end > 0)
    places = [first if end == 0 else end for end in places]
    found = []
    for place in places:
        before = max([other for other in places if other < place], default=0)
        found.append(len(text[before:place].encode()) / places.count(place))
    return found


def repetition(tokens: Sequence[int], n: int = 4) -> int:
    """How many of the n-grams occurred before."""
    count = 0
    for i in range(len(tokens) - n + 1):
        count += any(list(tokens[j : j + n]) == list(tokens[i : i + n]) for j in range(i))
    return count


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens are equal before the first difference."""
    count = 0
    for a, b in zip(first, second, strict=True):
        if a != b:
            break
        count += 1
    return count
