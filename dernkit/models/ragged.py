"""Models whose layers have different numbers of experts: how config.json says so, and how their blocks are made.

No config of transformers has a count for each layer. The model's own field holds the largest one, and ``FIELD`` that of
every layer. A loader that does not know the field builds routers with too many rows and stops at the first smaller one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from dernkit.api import Block
from dernkit.errors import CheckpointError
from dernkit.types import CompressedLayer, ExpertBank

FIELD = "dernkit_experts"
"""Field at the top of config.json: the number of experts in every MoE layer, in their order."""


def read_counts(path: Path, fields: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The counts that a config.json has; None for an ordinary checkpoint.

    Raises:
        CheckpointError: the field holds something else.
    """
    counts = fields.get(FIELD)
    if counts is None:
        return None
    if not isinstance(counts, list) or not counts or any(type(count) is not int or count < 1 for count in counts):
        raise CheckpointError(
            f"{path / 'config.json'}: '{FIELD}' must list the number of experts of every MoE layer. Got {counts} "
            f"instead. Copy config.json from the result again."
        )
    return tuple(counts)


def set_counts(path: Path, blocks: Sequence[Block], counts: Sequence[int]) -> None:
    """Cut every block of a model on the meta device to the number of experts that it has in the checkpoint.

    Raises:
        CheckpointError: the counts are not for these blocks.
    """
    experts = [block.dims.experts for block in blocks]
    if len(counts) != len(blocks) or any(count > most for count, most in zip(counts, experts, strict=False)):
        raise CheckpointError(
            f"{path / 'config.json'}: '{FIELD}' must be for {len(blocks)} MoE layers of up to {max(experts)} experts. "
            f"Got {list(counts)} instead. Copy config.json from the result again."
        )
    for block, count in zip(blocks, counts, strict=True):
        if count < block.dims.experts:
            block.replace(_first(block.bank(), count))


def _first(bank: ExpertBank, count: int) -> CompressedLayer:
    """Views of the first ``count`` experts: shapes are all that matters, but real buffers stay real."""

    def cut(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[:count]

    def entries(tensor: Tensor) -> Tensor:
        dims = [dim for dim, size in enumerate(tensor.shape) if size == bank.dims.experts]
        return tensor.narrow(dims[-1], 0, count)

    return CompressedLayer(
        layer=bank.dims.layer,
        gate=cut(bank.gate),
        up=bank.up[:count],
        down=bank.down[:count],
        gate_bias=cut(bank.gate_bias),
        up_bias=cut(bank.up_bias),
        down_bias=cut(bank.down_bias),
        router=bank.router[:count],
        per_expert={name: entries(tensor) for name, tensor in bank.per_expert.items()} | dict(bank.tables),
    )
