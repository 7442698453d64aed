"""Which device the weights of a layer lie on while they run, are compared and are changed.

Everything that belongs to one layer is computed where its weights lie; decisions, statistics and results come back to
the CPU. On another device the last bits of float32 sums differ.
"""

from __future__ import annotations

import os

import torch
from torch import nn

from dernkit.errors import RecipeError

CPU = torch.device("cpu")
_FIX = "Use 'auto', 'cpu' or, for the second GPU, 'cuda:1'."


def device_of(name: str) -> torch.device:
    """``auto``: the first CUDA GPU, or the CPU where there is none; else what torch calls by that name.

    Raises:
        RecipeError: there is no such device, or it has no float64.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        if device.type == "cuda":  # the same bits in every run, but for what has no such kernel
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        torch.zeros(1, dtype=torch.float64, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        why = str(error).strip().splitlines()[0].rstrip(".")[:200] or type(error).__name__
        raise RecipeError(
            f"--device: must be a device that torch can put float64 tensors on here. Got '{name}' ({why}) instead. "
            f"{_FIX}"
        ) from None
    return device


def home(model: nn.Module) -> torch.device:
    """Where a model's inputs go: where the first of its parameters lies that are there."""
    return next((parameter.device for parameter in model.parameters() if not parameter.is_meta), CPU)
