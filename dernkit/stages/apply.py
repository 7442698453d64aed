"""Apply: a plan and a checkpoint in, a smaller checkpoint out. Arithmetic only; all decisions are in the plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dernkit.api import Block, Merge, Refit, Router
from dernkit.errors import CheckpointError
from dernkit.kernel.compress import NO_STATISTICS, check_width, compress_layer, target_width
from dernkit.kernel.fit import Fit, judge
from dernkit.kernel.selection import kept_count, limits
from dernkit.models.export import Export, export_of
from dernkit.models.folder import copy_other_files, edited_config, verify
from dernkit.models.groups import regrouped
from dernkit.models.padding import check_padding, padded, refuse_chosen
from dernkit.models.probe import set_field
from dernkit.models.ragged import FIELD
from dernkit.models.source import SourceModel
from dernkit.models.store import Store
from dernkit.models.writer import ShardWriter
from dernkit.progress import Progress
from dernkit.stages.journal import JOURNAL, Journal
from dernkit.types import CompressedLayer, ExpertBank, LayerDims, LayerPlan, LayerStats

Seen = Callable[[Block, LayerPlan, CompressedLayer, LayerStats], None]
"""What is shown a layer: its block as it was, its plan, what came of it, and its statistics."""


def apply_live(
    model: Any,
    blocks: Sequence[Block],
    plans: Sequence[LayerPlan],
    merge: Merge | None,
    router: Router,
    *,
    seed: int,
    width: int | None = None,
    export: str = "auto",
    stats: Mapping[int, LayerStats] = MappingProxyType({}),
    refit: Refit | None = None,
    seen: Seen | None = None,
) -> Export:
    """Surgery on every block of a model in memory, and on its config.

    Layers that keep different numbers of experts are padded where ``export`` wants it; where not, the config gets a
    field that `load_model` understands, and transformers refuses what ``save_pretrained`` then writes.

    ``seen`` is shown every layer, padding left out, after all are compressed and before the first is put in its place.
    """
    blocks = regrouped(model, blocks, collapse=_one_group(plans))
    check_new_width(blocks, width)
    width = target_width(plans, merge, width)
    result = export_of(blocks, [len(plan.kept) for plan in plans], export)
    changes = blocks[0].config_changes(result.most, width)
    with torch.no_grad():
        # All before the first is put in its place: an error must leave the model as it is.
        layers = [
            compress_layer(block.bank(), plan, merge, router, width, seed, stats.get(block.layer, NO_STATISTICS), refit)
            for block, plan in zip(blocks, plans, strict=True)
        ]
        for each in zip(blocks, plans, layers, strict=True):
            if seen is not None:
                seen(*each, stats.get(each[0].layer, NO_STATISTICS))
        filled = [_filled(*each, result) for each in zip(layers, blocks, plans, strict=True)]
        for block, plan, layer in zip(blocks, plans, filled, strict=True):
            block.replace(layer)
            if len(plan.kept) < block.dims.experts:
                refuse_chosen(block, len(plan.kept), model)
    for field, value in changes.items():
        set_field(model.config, field, value)
    if result.kind == "dernkit":
        setattr(model.config, FIELD, list(result.counts))
    return result


def _filled(compressed: CompressedLayer, block: Block, plan: LayerPlan, result: Export) -> CompressedLayer:
    """With the experts that the layer lacks, where the result is padded."""
    bias = block.padding() if result.kind == "padded" and len(plan.kept) < result.most else None
    if bias is None:
        return compressed
    groups = 1 if plan.one_group else block.dims.groups
    return padded(compressed, block.bank(), result.most, bias, groups=groups)


@dataclass(frozen=True, slots=True)
class Applied:
    """What `apply_checkpoint` did."""

    export: Export
    fits: Mapping[str, Mapping[str, Any]]
    """The fields of `Fit` of every refitted layer, by its number."""


def apply_checkpoint(
    source: SourceModel,
    plans: Sequence[LayerPlan],
    merge: Merge | None,
    router: Router,
    *,
    seed: int,
    folder: Path,
    key: str,
    progress: Progress,
    width: int | None = None,
    mtp: str = "compress",
    export: str = "auto",
    stats: Mapping[int, LayerStats] = MappingProxyType({}),
    refit: Refit | None = None,
) -> Applied:
    """Stream the compressed checkpoint into ``folder``, one block's weights in memory at a time.

    Args:
        source: the model.
        plans: one per MoE block, in layer order.
        merge: how arrivals are merged (None when nothing moves).
        router: how router rows follow.
        seed: seeds the merges' generators.
        folder: an existing directory that holds nothing but what a killed call `began` under the same ``key``.
        key: digest of all inputs; layers that a call with the same key has finished are not done again.
        progress: where to report layers.
        width: neurons of an expert after surgery; None: what the merge needs.
        mtp: whether multi-token-prediction layers are compressed by the last layer's plan ("compress") or left out
            ("drop").
        export: how layers that keep different numbers of experts are written; see `dernkit.models.export`.
        stats: of every layer, for what reads some.
        refit: how down projections follow, if they do.
    """
    works, result = _works(_open(source, mtp), plans, export)
    store, blocks = works[0].store, [work.block for work in works[: len(plans)]]
    check_new_width(blocks, width)
    width = target_width(plans, merge, width)
    dropped = source.mtp.tensors if mtp == "drop" else ()
    replaced, removed = _layout(works, width)
    writer = ShardWriter(source.checkpoint, folder, replaced, removed.union(dropped))
    store.refuse_non_finite_on_disk(writer.copied)
    store.refuse_non_finite_tensors(set(writer.copied).intersection(source.mtp.tensors))
    journal = Journal(folder / JOURNAL, key, fresh=not writer.resumed)
    writer.allocate()
    with progress.track("apply", len(works), "layers") as tracker:
        for work in works:
            if work.layer not in journal.done:
                seen = stats.get(work.plan.layer, NO_STATISTICS)
                tensors, fit = _compressed(work, merge, router, width, seed, seen, refit)
                writer.put(tensors)
                journal.add(work.layer, None if fit is None else asdict(fit))
            tracker.advance(1, f"layer {work.layer}")
    writer.copy_untouched()
    writer.finish()
    changes, uneven = blocks[0].config_changes(result.most, width), result.kind == "dernkit"
    config = edited_config(source, changes, drop_mtp=bool(dropped), counts=result.counts if uneven else None)
    (folder / "config.json").write_bytes(config.encode())
    copy_other_files(source.path, folder)
    written = verify(folder, source, result.written, blocks[0].dims.groups)
    if result.kind == "padded":
        check_padding(*written.open(), result.counts)
    journal.remove()
    return Applied(result, journal.facts)


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
    opened, dropped = _open(source, mtp), source.mtp.tensors if mtp == "drop" else ()
    found = []
    for plans, width in choices:
        replaced, removed = _layout(_works(opened, plans, export)[0], width)
        gone = removed.union(replaced, dropped)
        stays = (entry for name, entry in source.checkpoint.tensors.items() if name not in gone)
        new = (tensor.numel() * tensor.element_size() for tensor in replaced.values())
        found.append(sum(entry.end - entry.start for entry in stays) + sum(new))
    return found


def check_new_width(blocks: Sequence[Block], width: int | None) -> None:
    """Refuse a width that the kernels or the model do not allow; None is the merge's own choice.

    Raises:
        RecipeError: rows of that width are not aligned.
        CheckpointError: something follows the width that cannot.
    """
    if width is not None:
        check_width(width, blocks[0].dims.width, blocks[0].bank().up.dtype)
        blocks[0].config_changes(blocks[0].dims.experts, width)


@dataclass(frozen=True, slots=True)
class _Work:
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


_Opened = tuple[Store, list[Block], list[tuple[str, Store, Block]]]
"""The model's store and MoE blocks, and path, store and block of every multi-token-prediction layer to compress."""


def _open(source: SourceModel, mtp: str) -> _Opened:
    extra = source.mtp.layers if mtp == "compress" else ()
    return (*source.open(keep_dtypes=True), [(x.path, *source.open_mtp(x, keep_dtypes=True)) for x in extra])


def _works(opened: _Opened, plans: Sequence[LayerPlan], export: str) -> tuple[list[_Work], Export]:
    """All MoE blocks, those of multi-token-prediction layers behind the others."""
    store, blocks, extra = opened
    blocks = regrouped(store.model, blocks, collapse=_one_group(plans))
    _check_fit(blocks, plans)
    result = export_of(blocks, [len(plan.kept) for plan in plans], export)
    works = [_Work(block.layer, store, block, plan, result) for block, plan in zip(blocks, plans, strict=True)]
    return works + [_Work(*place, plans[-1], result) for place in extra], result


def _one_group(plans: Sequence[LayerPlan]) -> bool:
    """Whether the plans make one group of all: the config has one field for every layer."""
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


def _compressed(
    work: _Work,
    merge: Merge | None,
    router: Router,
    width: int,
    seed: int,
    stats: LayerStats,
    refit: Refit | None,
) -> tuple[Mapping[str, Tensor], Fit | None]:
    store, block = work.store, work.block
    modules = block.modules(width)
    for path in modules:
        store.load(path)
    _check_round_trip(store, block)
    with torch.no_grad():
        # What was sampled is the input of the last MoE layer, not that of a multi-token-prediction layer.
        refit = refit if isinstance(work.layer, int) else None
        bank = block.bank()
        compressed = compress_layer(bank, work.plan, merge, router, width, seed, stats, refit)
        fit = None if refit is None or "sample" not in stats.values else judge(bank, compressed, work.plan, stats)
        resized = block.resized(_filled(compressed, block, work.plan, work.result))
    for path in modules:
        store.unload(path)
    return work.to_disk(resized), fit


def _check_round_trip(store: Store, block: Block) -> None:
    """What is loaded and written back unchanged must be the source's bytes: else the layout is not understood."""
    for name, tensor in block.tensors().items():
        for key, value in store.to_disk({name: tensor}).items():
            if key not in store.checkpoint.tensors or not torch.equal(value.cpu(), store.checkpoint.read(key)):
                raise CheckpointError(
                    f"{store.checkpoint.path}: reading and writing back must give the same tensors. Got a different "
                    f"'{store.checkpoint.stored(key)}' instead. This checkpoint's layout needs an adapter plugin."
                )


def _layout(works: Iterable[_Work], width: int) -> tuple[dict[str, Tensor], frozenset[str]]:
    """Names on disk -> meta tensors of the new shapes, and the names that go."""
    replaced: dict[str, Tensor] = {}
    touched: set[str] = set()
    for work in works:
        checkpoint, block = work.store.checkpoint, work.block
        blank = _blank(block.bank(), work.plan, width)
        resized = block.resized(_filled(blank, block, work.plan, work.result))
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
