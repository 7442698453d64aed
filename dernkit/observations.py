"""What an evaluator measured, document by document: what intervals and paired comparisons are made from."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Observations:
    """One metric on n documents, in G groups (domains of text, tasks).

    In a group the metric is the sum of the values over the sum of the weights, and over all it is the mean of the
    groups. Bits per byte: bits and bytes of each document. Accuracy: 0 or 1, and weight 1.
    """

    documents: tuple[str, ...]
    """n different names: the same document has the same name for every model."""
    groups: tuple[str, ...]
    """n names of groups."""
    values: NDArray[np.float64]
    """[n], finite."""
    weights: NDArray[np.float64]
    """[n], above 0."""
    higher_is_better: bool = False

    def by_group(self) -> dict[str, float]:
        """The metric in each group, by the names' order."""
        groups = np.asarray(self.groups)
        return {
            str(name): float(self.values[groups == name].sum() / self.weights[groups == name].sum())
            for name in np.unique(groups)
        }

    def mean(self) -> float:
        """The metric: the mean of the groups."""
        return float(np.mean(list(self.by_group().values())))
