"""Runs in the environment of mlx-lm, which has no torch: logits of a checkpoint directory."""

from __future__ import annotations

from importlib.metadata import version as installed
from pathlib import Path

import mlx.core as mx
import numpy as np
from answering import answer
from mlx_lm.utils import load_model


def version() -> str:
    """The version of this client."""
    return f"mlx-lm {installed('mlx-lm')}, mlx {installed('mlx')}"


def logits(folder: str, ids: list[list[int]], out: str) -> None:
    """Write the logits in float32, the only dtype in which MLX multiplies experts on a CPU."""
    model, _ = load_model(Path(folder))
    model.set_dtype(mx.float32)
    np.save(out, np.array(model(mx.array(ids)), dtype=np.float32))


def code(folder: str) -> str:
    """The module that reads a checkpoint."""
    return type(load_model(Path(folder), lazy=True)[0]).__module__


if __name__ == "__main__":
    answer(version=version, logits=logits, code=code)
