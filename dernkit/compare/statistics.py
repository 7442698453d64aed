"""Paired comparison of models that were measured on the same documents, after calibrations with several seeds.

Documents and seeds are both samples: of text like this, and of calibrations like these. So the variance of a difference
is that over the documents (differences averaged over the seeds) plus that over the seeds (differences averaged over the
documents): the variance of Clark's min F' (1973), with Satterthwaite's degrees of freedom. What documents and seeds
do together is in both parts, which makes intervals too wide rather than too narrow. The variance over the documents is
that of a bootstrap within each group. For crossed samples like these see also Owen, The pigeonhole bootstrap (2007).

Shapes: M measurements (a model after one recipe and seed), n documents, G groups, R resamples, S seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from dernkit.errors import CheckpointError
from dernkit.observations import Observations

CONFIDENCE = 0.95
RESAMPLES = 2000
_SEED = 20_250_913
_CHUNK = 4_000_000
"""Drawn documents in memory at a time."""

Floats = NDArray[np.float64]
Side = Mapping[int | None, int]
"""Seed -> measurement, of one recipe. An original has the seed None: it is one model and not a sample."""


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and the ends of its 95 % interval, in units of the metric unless said otherwise."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Panel:
    """Measurements of the same documents, and of resamples of them that are the same for all."""

    groups: tuple[str, ...]
    """G names, sorted."""
    documents: tuple[int, ...]
    """How many there are in each group."""
    values: Floats
    """[M, G]: the metric in each group."""
    replicates: Floats
    """[M, G, R]: the metric in each group of each resample."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A weighted sum of recipes' metrics with the independent parts of its variance."""

    value: float
    by_group: Floats
    """[G]"""
    variances: Floats
    """[C]: of each group's documents, then of the seeds of each sample."""
    freedom: Floats
    """[C]: degrees of freedom of each of them."""
    seeds: int
    """The fewest of any sample; 1: nothing is known about other seeds."""

    @property
    def variance(self) -> float:
        return float(self.variances.sum())

    @property
    def t(self) -> float:
        """Half the width of the interval in standard errors: Student's, with Satterthwaite's degrees of freedom."""
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self._degrees()))

    @property
    def interval(self) -> Interval:
        half = self.t * self.variance**0.5
        return Interval(self.value, self.value - half, self.value + half)

    @property
    def p(self) -> float:
        """Two-sided, of the value 0."""
        if self.variance == 0 or self.value == 0:
            return 1.0 if self.value == 0 else 0.0
        return float(2 * stats.t.sf(abs(self.value) / self.variance**0.5, self._degrees()))

    def _degrees(self) -> float:
        if self.variance == 0:
            return float(self.freedom.max())
        shares = self.variances / self.variance
        return float(1 / (shares**2 / self.freedom).sum())


def panel(measurements: Sequence[Observations], *, where: str, resamples: int = RESAMPLES) -> Panel:
    """Bootstrap of the documents of each group, the same draws for all measurements and in every process.

    Of n documents n − 1 are drawn with replacement: then the variance is right for small groups, too (Rao & Wu 1988).

    Raises:
        CheckpointError: measurements of different documents, or a group of one document.
    """
    values, weights, groups = _aligned(measurements, where)
    names, sizes = np.unique(groups, return_counts=True)
    for name, size in zip(names, sizes, strict=True):
        if size < 2:
            raise CheckpointError(
                f"{where}: every domain or task must hold at least 2 documents, as one says nothing about others. "
                f"Got '{name}' with 1 instead. Divide its text into several documents."
            )
    rng = np.random.default_rng(_SEED)
    means = np.empty((len(measurements), len(names)))
    replicates = np.empty((*means.shape, resamples))
    for g, name in enumerate(names):
        v, w = values[:, groups == name], weights[:, groups == name]
        if (w == w[:1]).all():
            w = w[:1]
        means[:, g] = v.sum(axis=1) / w.sum(axis=1)
        done = 0
        while done < resamples:
            counts = _counts(rng, v.shape[1], min(resamples - done, max(1, _CHUNK // v.shape[1])))
            replicates[:, g, done : done + len(counts)] = (v @ counts.T) / (w @ counts.T)
            done += len(counts)
    return Panel(tuple(map(str, names)), tuple(map(int, sizes)), means, replicates)


def _counts(rng: np.random.Generator, documents: int, resamples: int) -> Floats:
    """[resamples, documents]: how often each document is drawn."""
    drawn = rng.integers(0, documents, size=(resamples, documents - 1))
    drawn += np.arange(resamples)[:, None] * documents
    counts = np.bincount(drawn.ravel(), minlength=resamples * documents)
    return counts.reshape(resamples, documents).astype(np.float64)


def _aligned(measurements: Sequence[Observations], where: str) -> tuple[Floats, Floats, NDArray[np.str_]]:
    """Values and weights [M, n] and groups [n] by the order of groups and documents."""
    values, weights, known = [], [], None
    for seen in measurements:
        order = np.lexsort((np.asarray(seen.documents), np.asarray(seen.groups)))
        documents = [(seen.groups[i], seen.documents[i]) for i in order]
        known = documents if known is None else known
        if documents != known or len(set(seen.documents)) != len(documents):
            odd = sorted({name for _, name in set(documents) ^ set(known)})
            got = f"'{odd[0]}' in some of them only" if odd else "a document twice"
            raise CheckpointError(
                f"{where}: what is compared must be measured on the same documents in the same domains. "
                f"Got {got} instead. Evaluate all of them again on one set."
            )
        values.append(seen.values[order])
        weights.append(seen.weights[order])
    return np.asarray(values), np.asarray(weights), np.asarray([group for group, _ in known or []])


def estimate(panel: Panel, terms: Sequence[tuple[float, Side]]) -> Estimate:
    """Sum of factor × metric of each side, over documents and seeds like these.

    Sides are paired by seed where they have the same seeds, and by those that they share if these are two or more; else
    each side is a sample of its own.
    """
    samples = _samples(panel.values, terms)
    by_group = sum(sample.mean(axis=0) for sample in samples)
    replicates = sum(sample.mean(axis=0) for sample in _samples(panel.replicates, terms))
    groups = len(panel.groups)
    variances = list(np.var(replicates, axis=-1, ddof=1) / groups**2)
    freedom = [size - 1 for size in panel.documents]
    for sample in samples:
        if len(sample) > 1:
            variances.append(np.var(sample.mean(axis=1), ddof=1) / len(sample))
            freedom.append(len(sample) - 1)
    return Estimate(
        value=float(np.mean(by_group)),
        by_group=np.asarray(by_group),
        variances=np.asarray(variances, dtype=np.float64),
        freedom=np.asarray(freedom, dtype=np.float64),
        seeds=min(len(sample) for sample in samples),
    )


def _samples(measured: Floats, terms: Sequence[tuple[float, Side]]) -> list[Floats]:
    """[S, …] of each independent sample of seeds; the sum of their means is the sum of the terms.

    Pairs are subtracted before anything is averaged, so that equal measurements give exactly 0.
    """
    fixed = [factor * measured[side[None]] for factor, side in terms if None in side]
    sampled = [(factor, side) for factor, side in terms if None not in side]
    shared = [seed for seed in sampled[0][1] if all(seed in side for _, side in sampled)] if sampled else []
    if len(shared) > 1 or all(len(side) == len(shared) for _, side in sampled):
        sampled_rows = [factor * measured[[side[seed] for seed in shared]] for factor, side in sampled]
        samples = [_total(sampled_rows)] if sampled_rows else [np.zeros((1, *measured.shape[1:]))]
    else:
        samples = [factor * measured[list(side.values())] for factor, side in sampled]
    return [samples[0] + _total(fixed), *samples[1:]] if fixed else samples


def _total(parts: Sequence[Floats]) -> Floats:
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def recovered(panel: Panel, recipe: Side, against: Side, original: Side, *, worse: float) -> Interval | None:
    """1 − damage of ``recipe`` / damage of ``against``, with Fieller's interval for a ratio (1954).

    The interval holds every share s for which damage(recipe) − (1 − s) damage(against) is not told apart from 0 by
    `estimate`, so it counts that both come from the same documents and seeds.

    Args:
        worse: 1 where a higher metric is worse, −1 where it is better.

    Returns:
        None where the damage of ``against`` is not significantly above 0: a share of nothing has no meaning.
    """

    def rest(ratio: float) -> Estimate:
        return estimate(panel, [(1.0, recipe), (-ratio, against), (ratio - 1.0, original)])

    damage = estimate(panel, [(1.0, against), (-1.0, original)])
    if damage.interval.low * damage.interval.high <= 0 or damage.value * worse < 0:
        return None
    # The variance of rest(ratio) is none.variance - 2 ratio both + ratio² all_variance, which three of them give.
    none, one, minus = rest(0.0), rest(1.0), rest(-1.0)
    whole, all_variance = none.value - one.value, (one.variance + minus.variance) / 2 - none.variance
    both = (minus.variance - one.variance) / 4
    ratio = none.value / whole
    t2 = rest(ratio).t ** 2
    a = whole**2 - t2 * all_variance
    b = none.value * whole - t2 * both
    c = none.value**2 - t2 * none.variance
    if a <= 0:
        return None
    half = max(b * b - a * c, 0.0) ** 0.5 / a
    return Interval(1 - ratio, 1 - b / a - half, 1 - b / a + half)


def holm(p: Sequence[float]) -> list[float]:
    """Adjusted so that in a family without differences one is found with a chance of 5 % at most (Holm 1979)."""
    order = np.argsort(p, kind="stable")
    steps = np.asarray(p, dtype=np.float64)[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty(len(p))
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0) if len(p) else steps
    return [float(value) for value in adjusted]
