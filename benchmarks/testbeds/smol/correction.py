"""Down projections that make up for the experts that a token does not choose: least squares, no training."""

import torch
from torch import Tensor


class Corrector:
    """Sums over tokens from which the best down projection follows.

    The features [n, W] are the activations as they reach the down projection: each times the coefficient of its expert.
    """

    def __init__(self, width: int, outputs: int) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64)
        self.cross = torch.zeros(width, outputs, dtype=torch.float64)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Count tokens with `features` [n, W] and wanted outputs `targets` [n, H]."""
        self.gram += (features.T @ features).double()
        self.cross += (features.T @ targets).double()

    def solve(self, down: Tensor, strength: float) -> Tensor:
        """The projection [H, W] with the least squared error plus `strength` Σ_j gram_jj ‖D_j - `down`_j‖².

        A neuron that was never on keeps its column.
        """
        start = down.double()
        system = self.gram.clone()
        penalty = strength * self.gram.diagonal()
        penalty = penalty + (penalty == 0).double()
        system.diagonal().add_(penalty)
        change = torch.linalg.solve(system, self.cross - self.gram @ start.T)
        return (start + change.T).float()
