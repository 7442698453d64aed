"""What plans make of a checkpoint: its blocks with what becomes of each, and the names and shapes of the result.

No weights are read here, and none are made: shapes lie on the meta device.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor

from dernkit.api import Block
from dernkit.errors import CheckpointError
from dernkit.kernel.selection import kept_count, limits
from dernkit.models.export import Export, export_of
from dernkit.models.groups import regrouped
from dernkit.models.padding import padded
from dernkit.models.source import SourceModel
from dernkit.models.store import Store
from dernkit.types import CompressedLayer, ExpertBank, LayerDims, LayerPlan


@dataclass(frozen=True, slots=True)
class Work:
    """One MoE block, and the store that loads it."""

    layer: int | str
    """The decoder layer's number, or where a multi-token-prediction layer lies."""
    store: Store
    block: Block
    plan: LayerPlan
    result: Export

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In-memory tensors under their names in the checkpoint's files."""
        return {self.store.checkpoint.stored(key): value for key, value in self.store.to_disk(tensors).items()}


Opened = tuple[Store, list[Block], list[tuple[str, Store, Block]]]
"""The model's store and MoE blocks, and path, store and block of every multi-token-prediction layer to compress."""


def open_all(source: SourceModel, mtp: str) -> Opened:
    """Fresh stores in the dtypes on disk; ``mtp`` as for `apply_checkpoint`."""
    extra = source.mtp.layers if mtp == "compress" else ()
    return (*source.open(keep_dtypes=True), [(x.path, *source.open_mtp(x, keep_dtypes=True)) for x in extra])


def all_work(opened: Opened, plans: Sequence[LayerPlan], export: str) -> tuple[list[Work], Export]:
    """All MoE blocks, those of multi-token-prediction layers behind the others.

    Raises:
        CheckpointError: the plans are not for this model, or keep what its routers do not allow.
    """
    store, blocks, extra = opened
    blocks = regrouped(store.model, blocks, collapse=one_group(plans))
    _check_fit(blocks, plans)
    result = export_of(blocks, [len(plan.kept) for plan in plans], export)
    works = [Work(block.layer, store, block, plan, result) for block, plan in zip(blocks, plans, strict=True)]
    return works + [Work(*place, plans[-1], result) for place in extra], result


def one_group(plans: Sequence[LayerPlan]) -> bool:
    """Whether the plans make one group of all: the config has one field for every layer.

    Raises:
        CheckpointError: some do and others do not.
    """
    wanted = {plan.one_group for plan in plans}
    if len(wanted) != 1:
        raise CheckpointError("plan: groups must become one in every layer or in none. Got both instead.")
    return wanted.pop()


def _check_fit(blocks: Sequence[Block], plans: Sequence[LayerPlan]) -> None:
    planned = [(plan.layer, plan.experts, plan.width) for plan in plans]
    found = [(block.layer, block.dims.experts, block.dims.width) for block in blocks]
    if planned != found:
        mine, theirs = next((a, b) for a, b in zip_longest(found, planned) if a != b)
        raise CheckpointError(
            f"plan: must be for the model's MoE layers. Got (layer, experts, width) {theirs or 'nothing'} for "
            f"{mine or 'no layer'} instead. Delete plan.json and run again."
        )
    for block, plan in zip(blocks, plans, strict=True):
        _check_kept(block.dims, plan.kept.tolist())


def _check_kept(dims: LayerDims, kept: list[int]) -> None:
    """What a person may have written into plan.json must be what the router allows."""
    kept_count(len(kept), limits(dims))
    group = dims.experts // dims.groups
    sizes = {sum(expert // group == index for expert in kept) for index in range(dims.groups)}
    if kept != sorted(set(kept)) or kept[0] < 0 or kept[-1] >= dims.experts or len(sizes) != 1:
        groups = f", as many from each group of {group}" if dims.groups > 1 else ""
        raise CheckpointError(
            f"plan, layer {dims.layer}: kept must be different experts from 0 to {dims.experts - 1} in ascending "
            f"order{groups}. Got {kept} instead."
        )


def filled(compressed: CompressedLayer, block: Block, plan: LayerPlan, result: Export) -> CompressedLayer:
    """With the experts that the layer lacks, where the result is padded."""
    bias = block.padding() if result.kind == "padded" and len(plan.kept) < result.most else None
    if bias is None:
        return compressed
    groups = 1 if plan.one_group else block.dims.groups
    return padded(compressed, block.bank(), result.most, bias, groups=groups)


def layout(works: Iterable[Work], width: int) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Names on disk -> meta tensors of the new shapes, and the names that go.

    Raises:
        CheckpointError: the source has no such names.
    """
    replaced: dict[str, Tensor] = {}
    touched: set[str] = set()
    for work in works:
        checkpoint, block = work.store.checkpoint, work.block
        blank = _blank(block.bank(), work.plan, width)
        resized = block.resized(filled(blank, block, work.plan, work.result))
        touched |= {checkpoint.stored(key) for key in work.store.keys({*resized, *block.tensors()})}
        replaced |= work.to_disk(resized)
    unknown = sorted(replaced.keys() - touched)
    if unknown:
        raise CheckpointError(
            f"{checkpoint.path}: results must go under names that the source has. Got '{unknown[0]}' instead. "
            f"This checkpoint's layout needs an adapter plugin."
        )
    return replaced, frozenset(touched - replaced.keys())


def _blank(bank: ExpertBank, plan: LayerPlan, width: int) -> CompressedLayer:
    kept, hidden = len(plan.kept), bank.down.shape[1]

    def blank(like: Tensor, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device="meta")

    def maybe(like: Tensor | None, *shape: int) -> Tensor | None:
        return None if like is None else blank(like, *shape)

    return CompressedLayer(
        layer=plan.layer,
        gate=maybe(bank.gate, kept, width, hidden),
        up=blank(bank.up, kept, width, hidden),
        down=blank(bank.down, kept, hidden, width),
        gate_bias=maybe(bank.gate_bias, kept, width),
        up_bias=maybe(bank.up_bias, kept, width),
        down_bias=maybe(bank.down_bias, kept, hidden),
        router=blank(bank.router, kept, bank.router.shape[1]),
        per_expert={
            name: blank(value, *(kept if size == plan.experts else size for size in value.shape))
            for name, value in bank.per_expert.items()
        }
        | {name: blank(table, *table.shape) for name, table in bank.tables.items()},
    )


def expert_bytes(store: Store, blocks: Iterable[Block]) -> int:
    """Bytes on disk of everything in the checkpoint that belongs to routed experts (router rows left out)."""
    total = 0
    for block in blocks:
        for key in store.keys(block.expert_tensors()):
            parts = (store.checkpoint.on_disk[part] for part in store.checkpoint.parts(key))
            total += sum(entry.end - entry.start for entry in parts)
    return total


def result_bytes(
    source: SourceModel,
    choices: Sequence[tuple[Sequence[LayerPlan], int]],
    *,
    mtp: str = "compress",
    export: str = "auto",
) -> list[int]:
    """Bytes of all tensors that `apply_checkpoint` writes, for each choice; no weights are read, and no moves.

    Args:
        source: the model.
        choices: one plan per MoE block, in layer order, and the width of every expert after surgery (`target_width`).
        mtp: as there.
        export: as there.
    """
    opened, dropped = open_all(source, mtp), source.mtp.tensors if mtp == "drop" else ()
    found = []
    for plans, width in choices:
        replaced, removed = layout(all_work(opened, plans, export)[0], width)
        gone = removed.union(replaced, dropped)
        stays = (entry for name, entry in source.checkpoint.tensors.items() if name not in gone)
        new = (tensor.numel() * tensor.element_size() for tensor in replaced.values())
        found.append(sum(entry.end - entry.start for entry in stays) + sum(new))
    return found
