"""Paired comparison of models measured on the same documents, after calibrations with several seeds."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its 95 % interval, in units of the metric unless said otherwise."""

    estimate: float
    low: float
    high: float
