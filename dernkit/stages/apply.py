"""Apply: a plan and a checkpoint in, a smaller checkpoint out. Arithmetic only; all decisions are in the plan."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from dernkit.api import Block, Merge, Refit, Router
from dernkit.errors import CheckpointError
from dernkit.kernel.compress import NO_STATISTICS, check_width, compress_layer, target_width
from dernkit.kernel.fit import Fit, judge
from dernkit.models.export import Export, export_of
from dernkit.models.folder import copy_other_files, edited_config, verify
from dernkit.models.groups import regrouped
from dernkit.models.padding import check_padding, refuse_chosen
from dernkit.models.probe import set_field
from dernkit.models.ragged import FIELD
from dernkit.models.source import SourceModel
from dernkit.models.store import Store
from dernkit.models.writer import ShardWriter
from dernkit.progress import Progress
from dernkit.stages.journal import JOURNAL, Journal
from dernkit.stages.results import Work, all_work, filled, layout, one_group, open_all
from dernkit.types import CompressedLayer, LayerPlan, LayerStats

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
    blocks = regrouped(model, blocks, collapse=one_group(plans))
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
        whole = [filled(*each, result) for each in zip(layers, blocks, plans, strict=True)]
        for block, plan, layer in zip(blocks, plans, whole, strict=True):
            block.replace(layer)
            if len(plan.kept) < block.dims.experts:
                refuse_chosen(block, len(plan.kept), model)
    for field, value in changes.items():
        set_field(model.config, field, value)
    if result.kind == "dernkit":
        setattr(model.config, FIELD, list(result.counts))
    return result


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
    works, result = all_work(open_all(source, mtp), plans, export)
    store, blocks = works[0].store, [work.block for work in works[: len(plans)]]
    check_new_width(blocks, width)
    width = target_width(plans, merge, width)
    dropped = source.mtp.tensors if mtp == "drop" else ()
    replaced, removed = layout(works, width)
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


def check_new_width(blocks: Sequence[Block], width: int | None) -> None:
    """Refuse a width that the kernels or the model do not allow; None is the merge's own choice.

    Raises:
        RecipeError: rows of that width are not aligned.
        CheckpointError: something follows the width that cannot.
    """
    if width is not None:
        check_width(width, blocks[0].dims.width, blocks[0].bank().up.dtype)
        blocks[0].config_changes(blocks[0].dims.experts, width)


def _compressed(
    work: Work,
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
        resized = block.resized(filled(compressed, block, work.plan, work.result))
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
