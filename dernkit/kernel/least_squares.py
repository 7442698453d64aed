"""Least squares with a ridge, for as many neurons and tokens as there are, and judged on text that was left out.

The same solutions two ways: with fewer neurons than tokens from the neurons' Gram matrix, with fewer tokens than
neurons from the tokens'. Up to 4,096 on the smaller side in float64, beyond in float32; where a float32 matrix turns
out not to be positive definite, in float64 after all.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float32, Int64
from torch import Tensor

from dernkit.errors import CheckpointError
from dernkit.types import LayerStats

_ROWS = 4096
"""Tokens whose products are summed in float32 at a time."""
_EXACT = 4096
"""Equations that are solved in float64."""


@dataclass(frozen=True, slots=True)
class Solved:
    """``w = (A + λI)⁻¹ B`` with what saliencies need of the inverse."""

    weights: Float[Tensor, "neurons hidden"]
    diagonal: Float[Tensor, " neurons"]
    """Of ``(A + λI)⁻¹``."""
    block: Callable[[Int64[Tensor, " some"]], Float[Tensor, "some some"]]
    """Rows and columns of ``(A + λI)⁻¹`` for some neurons."""


class System(ABC):
    """``min_w Σ‖y − wᵀh‖² + λ‖w‖²`` over some tokens; A = hᵀh and B = hᵀy."""

    @property
    @abstractmethod
    def energy(self) -> float:
        """``Σ‖y‖²``."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it is solved."""

    @abstractmethod
    def __len__(self) -> int:
        """Neurons."""

    @abstractmethod
    def __add__(self, other: System) -> System:
        """That of both token sets."""

    @abstractmethod
    def of(self, neurons: Int64[Tensor, " some"]) -> System:
        """That of some neurons."""

    @abstractmethod
    def towards(self, hidden: Tensor, wanted: Float[Tensor, "tokens hidden"]) -> System:
        """That of the same features, which are handed in again, and another y."""

    @abstractmethod
    def squares(self) -> Float[Tensor, " neurons"]:
        """diag A."""

    @abstractmethod
    def products(self, some: Int64[Tensor, " a"], others: Int64[Tensor, " b"]) -> Float[Tensor, "a b"]:
        """Rows ``some`` and columns ``others`` of A."""

    @abstractmethod
    def solve(self, damping: float) -> Float[Tensor, "neurons hidden"]:
        """``w = (A + λI)⁻¹ B``."""

    @abstractmethod
    def solved(self, damping: float) -> Solved:
        """The same and the inverse."""

    @abstractmethod
    def error(self, weights: Float[Tensor, "neurons hidden"]) -> float:
        """``Σ‖y − wᵀh‖²``."""


@dataclass(frozen=True, slots=True)
class ByNeurons(System):
    """From A and B, which add up over tokens."""

    gram: Float[Tensor, "neurons neurons"]
    right: Float[Tensor, "neurons hidden"]
    squared: float

    @property
    def energy(self) -> float:
        return self.squared

    @property
    def device(self) -> torch.device:
        return self.gram.device

    def __len__(self) -> int:
        return len(self.gram)

    def __add__(self, other: System) -> ByNeurons:
        assert isinstance(other, ByNeurons)
        return ByNeurons(self.gram + other.gram, self.right + other.right, self.squared + other.squared)

    def of(self, neurons: Int64[Tensor, " some"]) -> ByNeurons:
        return ByNeurons(self.gram[neurons][:, neurons], self.right[neurons], self.squared)

    def towards(self, hidden: Tensor, wanted: Float[Tensor, "tokens hidden"]) -> ByNeurons:
        return ByNeurons(self.gram, *_right(hidden, wanted, self.gram.dtype))

    def squares(self) -> Float[Tensor, " neurons"]:
        return self.gram.diagonal()

    def products(self, some: Int64[Tensor, " a"], others: Int64[Tensor, " b"]) -> Float[Tensor, "a b"]:
        return self.gram[some][:, others]

    def solve(self, damping: float) -> Float[Tensor, "neurons hidden"]:
        factor = _factor(self.gram, damping)
        return torch.cholesky_solve(self.right.to(factor.dtype), factor)

    def solved(self, damping: float) -> Solved:
        inverse = torch.cholesky_inverse(_factor(self.gram, damping))
        return Solved(
            inverse @ self.right.to(inverse.dtype), inverse.diagonal(), lambda some: inverse[some][:, some].clone()
        )

    def error(self, weights: Float[Tensor, "neurons hidden"]) -> float:
        w = weights.to(self.gram.dtype)
        return self.energy - 2 * float((w * self.right).sum()) + float((w * (self.gram @ w)).sum())


@dataclass(slots=True)
class ByTokens(System):
    """From ``K = hhᵀ``: ``(A + λI)⁻¹ B = hᵀ (K + λI)⁻¹ y`` and ``(A + λI)⁻¹ = (I − hᵀ (K + λI)⁻¹ h) / λ``."""

    hidden: Float[Tensor, "tokens neurons"]
    wanted: Float[Tensor, "tokens hidden"]
    _gram: Float[Tensor, "tokens tokens"] | None = None
    """K, once it was needed."""

    @property
    def energy(self) -> float:
        return float(self.wanted.square().sum(dtype=torch.float64))

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def __len__(self) -> int:
        return self.hidden.shape[1]

    def __add__(self, other: System) -> ByTokens:
        assert isinstance(other, ByTokens)
        return ByTokens(torch.cat([self.hidden, other.hidden]), torch.cat([self.wanted, other.wanted]))

    def of(self, neurons: Int64[Tensor, " some"]) -> ByTokens:
        gram = None
        if self._gram is not None and 2 * len(neurons) > len(self):  # fewer products: K less that of the others
            gone = torch.ones(len(self), dtype=torch.bool, device=self.device).index_fill_(0, neurons, False)
            others = self.hidden[:, gone].to(self._gram.dtype)
            gram = torch.addmm(self._gram, others, others.T, alpha=-1)
        return ByTokens(self.hidden[:, neurons], self.wanted, gram)

    def towards(self, hidden: Tensor, wanted: Float[Tensor, "tokens hidden"]) -> ByTokens:
        return ByTokens(hidden, wanted)  # their tokens may come in another order than K's

    def squares(self) -> Float[Tensor, " neurons"]:
        return self.hidden.square().sum(0, dtype=torch.float64)

    def products(self, some: Int64[Tensor, " a"], others: Int64[Tensor, " b"]) -> Float[Tensor, "a b"]:
        return self.hidden[:, some].T @ self.hidden[:, others]

    def solve(self, damping: float) -> Float[Tensor, "neurons hidden"]:
        factor = self._factor(damping)
        return self.hidden.to(factor.dtype).T @ torch.cholesky_solve(self.wanted.to(factor.dtype), factor)

    def solved(self, damping: float) -> Solved:
        factor = self._factor(damping)
        half = torch.linalg.solve_triangular(factor, self.hidden.to(factor.dtype), upper=False)
        weights = half.T @ torch.linalg.solve_triangular(factor, self.wanted.to(factor.dtype), upper=False)

        def block(some: Int64[Tensor, " some"]) -> Float[Tensor, "some some"]:
            part = half[:, some]
            return (torch.eye(len(some), dtype=half.dtype, device=half.device) - part.T @ part) / damping

        least = torch.finfo(half.dtype).eps  # a diagonal of 0 would be a neuron of infinite saliency
        return Solved(weights, (1 - half.square().sum(0)).clamp(min=least) / damping, block)

    def error(self, weights: Float[Tensor, "neurons hidden"]) -> float:
        found = self.hidden @ weights.to(self.hidden.dtype)
        return float((self.wanted - found).square().sum(dtype=torch.float64))

    def _factor(self, damping: float) -> Float[Tensor, "tokens tokens"]:
        if self._gram is None:
            hidden = self.hidden.to(_dtype(len(self.hidden)))
            self._gram = hidden @ hidden.T
        return _factor(self._gram, damping)


def _dtype(size: int) -> torch.dtype:
    return torch.float64 if size <= _EXACT else torch.float32


def _factor(matrix: Float[Tensor, "n n"], damping: float) -> Float[Tensor, "n n"]:
    """Cholesky factor of ``matrix + λI``."""
    damped = matrix.clone()
    damped.diagonal().add_(damping)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if bool(failed) and matrix.dtype == torch.float32:
        logging.getLogger(__name__).warning(
            "least squares: %d equations with λ = %.3g are not positive definite in float32; solved in float64, which "
            "takes longer. A larger 'ridge' avoids that.",
            *(len(matrix), damping),
        )
        return _factor(matrix.to(torch.float64), damping)
    if bool(failed):
        raise CheckpointError(
            f"least squares: equations of neurons with λ = {damping:.3g} must be positive definite. Got a singular "
            "matrix instead. Use a larger 'ridge', or a larger 'calibrate.sample'."
        )
    return factor


def damping(system: System, ridge: float) -> float:
    """``λ = ridge · mean diag A``; above 0 also where no neuron is ever active."""
    mean = float(system.squares().mean()) if len(system) else 0.0
    return ridge * mean if mean > 0 else 1.0


def total(systems: Sequence[System]) -> System:
    """That of all their tokens."""
    first, *others = systems
    for other in others:
        first = first + other
    return first


def equations(hidden: Float32[Tensor, "tokens neurons"], wanted: Float32[Tensor, "tokens hidden"]) -> ByNeurons:
    """Of features h and what they should give, y; products of 4,096 tokens at a time in float32, their sums in float64
    for up to 4,096 neurons."""
    gram = torch.zeros(hidden.shape[1], hidden.shape[1], dtype=_dtype(hidden.shape[1]), device=hidden.device)
    for h in hidden.split(_ROWS):
        gram += h.T @ h
    return ByNeurons(gram, *_right(hidden, wanted, gram.dtype))


def _right(hidden: Tensor, wanted: Tensor, dtype: torch.dtype) -> tuple[Float[Tensor, "neurons hidden"], float]:
    """``hᵀy`` and ``Σ‖y‖²``."""
    right = torch.zeros(hidden.shape[1], wanted.shape[1], dtype=dtype, device=hidden.device)
    for h, y in zip(hidden.split(_ROWS), wanted.split(_ROWS), strict=True):
        right += h.T @ y
    return right, float(wanted.square().sum(dtype=torch.float64))


def parts(stats: LayerStats, count: int) -> Int64[Tensor, " sampled"]:
    """Which of ``count`` consecutive parts of the calibration text each sampled token comes from.

    Neighbours stay together, so that leaving out a part leaves out whole documents, but for those at its ends.
    """
    return stats["sample_token"] * count // max(stats.sampled_tokens, 1)


def by_part(
    hidden: Float32[Tensor, "tokens neurons"],
    wanted: Float32[Tensor, "tokens hidden"],
    part: Int64[Tensor, " tokens"],
    count: int,
) -> list[System]:
    """One for each part, also for those without tokens; all of one kind."""
    tokens, neurons = hidden.shape
    make: Callable[[Tensor, Tensor], System] = ByTokens if tokens < neurons else equations
    return [make(hidden[part == number], wanted[part == number]) for number in range(count)]


def chosen_ridge(found: Sequence[System], ridges: Sequence[float]) -> float | None:
    """The ridge whose solutions do best on the parts that they were not fitted to; None: no solution beats w = 0.

    Ties go to the larger ridge.
    """
    dampings = {ridge: damping(total(found), ridge) for ridge in sorted(ridges, reverse=True)}
    errors = dict.fromkeys(dampings, 0.0)
    for number, part in enumerate(found):
        others = total([each for place, each in enumerate(found) if place != number])
        for ridge in dampings:
            errors[ridge] += part.error(others.solve(dampings[ridge]))
    best = min(errors, key=lambda ridge: errors[ridge])
    return best if errors[best] < sum(part.energy for part in found) else None
