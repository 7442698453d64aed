"""What the laws of all families share: a family's tiny model on disk, and the ways to load and run it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.nn import functional

from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.types import LayerPlan
from tests import families


def saved(folder: Path, name: str, **options: Any) -> Any:
    """The family's tiny model, also written to ``folder``."""
    model = families.build(name, **options)
    model.save_pretrained(folder)
    return model


def load(name: str, folder: Path) -> Any:
    """As stock transformers loads it; every key must find its place."""
    model, info = families.model_class(name).from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


def aligned(model: Any) -> Any:
    """The model with its tensors in fresh memory: in a mapped file they lie anywhere, and kernels round differently."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()
    return model


def logits(model: Any, name: str) -> Tensor:
    """Outputs for 2 x 10 fixed tokens."""
    return families.outputs(model, name)


@contextmanager
def masked(model: Any, plans: Sequence[LayerPlan]) -> Iterator[None]:
    """The model with the dropped experts out of the router's reach: what pruning must be equal to.

    Their logits and correction biases are minus infinity; tables of expert numbers name kept experts instead.
    """
    blocks = {block.layer: block for block in find_blocks(model, [Universal()])}
    restore = []
    for plan in plans:
        block: Any = blocks[plan.layer]
        router = block.module.get_submodule(block.router_name.split(".")[0])
        rows = block.module.get_parameter(block.router_name)
        restore.append((router, router.forward))
        router.forward = _masked(router.forward, plan.dropped, rows.shape)
        for name, dim in block.per_expert_dims.items():
            if name.endswith("bias") or name.endswith("biases"):
                bias = dict((*block.module.named_parameters(), *block.module.named_buffers()))[name]
                bias.data.index_fill_(dim, torch.tensor(plan.dropped), -torch.inf)
        for name in block.tables:
            _without(block.module.get_buffer(name), plan)
    yield
    for router, forward in restore:
        router.forward = forward


def _without(table: Tensor, plan: LayerPlan) -> None:
    """Row by row: a dropped expert's place goes to the best-scored kept expert that the row does not name yet."""
    best = sorted(plan.kept.tolist(), key=lambda expert: (-float(plan.scores[expert]), expert))
    for row in table:
        for place, expert in enumerate(row.tolist()):
            if expert in plan.dropped:
                row[place] = next(other for other in best if other not in row.tolist())


def _masked(forward: Any, dropped: list[int], shape: torch.Size) -> Any:
    linear = functional.linear

    def masked_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        out = linear(hidden, weight, bias)
        if weight.shape == shape:
            out[..., dropped] = -torch.inf
        return out

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        with patch.object(functional, "linear", masked_linear):
            return forward(*args, **kwargs)

    return wrapped
