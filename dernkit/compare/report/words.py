"""Numbers and counts as a report writes them."""

from __future__ import annotations

import math

from dernkit.compare.statistics import Interval


def counted(number: int, what: str) -> str:
    """``2 recipes``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def left_out(count: int, noun: str, which: str = "") -> str:
    """A sentence for captions; nothing where nothing is left out."""
    return f" Left out: {counted(count, noun)}{which}." if count > 0 else ""


def number(value: float, digits: int, *, sign: bool = False) -> str:
    """With a real minus, so that columns align."""
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def interval(found: Interval, digits: int) -> str:
    """``+0.12 [+0.10, +0.14]``."""
    return (
        f"{number(found.estimate, digits, sign=True)} "
        f"[{number(found.low, digits, sign=True)}, {number(found.high, digits, sign=True)}]"
    )


def share(found: Interval) -> str:
    """``41 % [40, 43]``."""
    return f"{_percent(found.estimate)} % [{_percent(found.low)}, {_percent(found.high)}]"


def _percent(share: float) -> str:
    return number(round(100 * share), 0) if math.isfinite(share) else "−∞" if share < 0 else "∞"


def probability(p: float) -> str:
    """To three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"
