"""Sequential calibration: each layer's statistics on what the compressed layers before it put out.

Layer by layer: all batches run through the layer as it is, which gives its statistics; it is planned and compressed;
all batches run through what it became, which gives the next layer's inputs. The plans are those that the plan stage
makes from these statistics, and the layers those that the apply stage writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from dernkit.api import Block, Merge, Refit, Router
from dernkit.kernel.compress import compress_layer, target_width
from dernkit.models.groups import regrouped
from dernkit.models.replay import Loader
from dernkit.models.restoring import compressed
from dernkit.models.sequence import replay_changing
from dernkit.models.source import SourceModel
from dernkit.models.stack import decoder_stack
from dernkit.progress import Progress, Tracker
from dernkit.stages.calibrate import Collector, Live, eager_experts, refuse_non_finite
from dernkit.stages.plan import Decisions, known_counts, plan_block
from dernkit.types import CompressedLayer, ExpertBank, LayerPlan, LayerStats


@runtime_checkable
class Surgery(Protocol):
    """The apply section of a recipe."""

    @property
    def merge(self) -> Merge | None: ...
    @property
    def router(self) -> Router: ...
    @property
    def refit(self) -> Refit | None: ...
    @property
    def width(self) -> int | None: ...


Result = tuple[dict[int, LayerStats], list[LayerPlan]]
"""Statistics by decoder layer, and the plan of every MoE block."""


def calibrate_checkpoint(
    source: SourceModel,
    batches: Sequence[Tensor],
    requires: frozenset[str],
    decisions: Decisions,
    surgery: Surgery,
    *,
    sample_size: int,
    seed: int,
    progress: Progress,
    held_out: int = 0,
) -> Result:
    """Statistics and plans from disk, one decoder layer in memory.

    Args:
        source: the model.
        batches: token ids [b, s], int64, full sequences.
        requires: statistics to collect.
        decisions: how layers are planned; the budget knows its counts before any layer has run.
        surgery: how plans are carried out.
        sample_size: capacity of the reservoir of layer inputs.
        seed: of the reservoir and of the merges.
        progress: where to report tokens.
        held_out: tokens at the end of which no component sees samples.
    """
    (store, blocks), (exact_store, exact) = source.open(), source.open(keep_dtypes=True)
    collapse = decisions.groups == "collapse"
    sequence = _Sequence(
        model=store.model,
        blocks=regrouped(store.model, blocks, collapse=collapse),
        exact=regrouped(exact_store.model, exact, collapse=collapse),
        weights=exact_store,
        decisions=decisions,
        surgery=surgery,
        seed=seed,
        collector=Collector(blocks, requires, sample_size=sample_size, seed=seed, held_out=held_out),
    )
    stack = decoder_stack(store.model, blocks)
    store.load_around(stack.owner_path, stack.paths)
    return sequence.run(batches, store, progress)


def calibrate_live(
    model: Any,
    blocks: Sequence[Block],
    batches: Sequence[Tensor],
    requires: frozenset[str],
    decisions: Decisions,
    surgery: Surgery,
    *,
    sample_size: int,
    seed: int,
    progress: Progress,
    held_out: int = 0,
) -> Result:
    """The same, bit for bit, from a model that is whole in memory and stays as it is; ``blocks`` are `regrouped`."""
    collector = Collector(blocks, requires, sample_size=sample_size, seed=seed, held_out=held_out)
    with eager_experts(model):
        return _Sequence(model, blocks, blocks, Live(), decisions, surgery, seed, collector).run(
            batches, Live(), progress
        )


@dataclass(slots=True)
class _Sequence:
    """One pass over the decoder layers."""

    model: Any
    blocks: Sequence[Block]
    """Those that run, in the dtypes of forward passes."""
    exact: Sequence[Block]
    """Those that are compressed, in the dtypes on disk."""
    weights: Loader
    """Loads the latter."""
    decisions: Decisions
    surgery: Surgery
    seed: int
    collector: Collector
    stats: dict[int, LayerStats] = field(default_factory=dict)
    plans: list[LayerPlan] = field(default_factory=list)

    def run(self, batches: Sequence[Tensor], loader: Loader, progress: Progress) -> Result:
        stack = decoder_stack(self.model, self.blocks)
        counts = known_counts(self.exact, self.decisions)
        last = self.blocks[-1].layer
        passes = last + len(self.blocks)  # layers up to the last MoE layer; all MoE layers but that one run twice
        with progress.track("calibrate", passes * sum(batch.numel() for batch in batches), "tokens") as tracker:
            replay_changing(
                stack.owner,
                stack.layers,
                stack.paths,
                batches,
                loader,
                self.collector.observe,
                {
                    block.layer: partial(self._decide, block, exact, count, tracker)
                    for block, exact, count in zip(self.blocks, self.exact, counts, strict=True)
                },
                lambda layer, tokens: tracker.advance(tokens, f"layer {layer + 1}/{last + 1}"),
            )
        return self.stats, self.plans

    def _decide(self, block: Block, exact: Block, count: int, tracker: Tracker) -> AbstractContextManager[None]:
        """Plan the layer, and compress it for those that come after it."""
        layer, how = block.layer, self.surgery
        tracker.advance(0, f"plan, layer {layer}")
        stats = self.collector.stats(layer)
        refuse_non_finite({layer: stats})
        self.weights.load(exact.path)
        plan = plan_block(exact, self.decisions, stats, count)
        self.stats[layer] = stats
        self.plans.append(plan)
        if block is self.blocks[-1]:
            self.weights.unload(exact.path)
            return nullcontext()
        # Wider experts than this layer's own are padded with zero neurons later: the same function.
        width = target_width([plan], how.merge, how.width)
        made = compress_layer(exact.bank(), plan, how.merge, how.router, width, self.seed, stats, how.refit)
        self.weights.unload(exact.path)
        return compressed(self.model, block, _cast(made, block.bank()))


def _cast(layer: CompressedLayer, bank: ExpertBank) -> CompressedLayer:
    """In the dtypes in which the block runs, as a loader of the result has it."""
    names = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias", "router")
    given = {name: (getattr(layer, name), getattr(bank, name)) for name in names}
    dtypes = {**bank.per_expert, **bank.tables}
    return replace(
        layer,
        **{name: value if like is None else value.to(like.dtype) for name, (value, like) in given.items()},
        per_expert={name: value.to(dtypes[name].dtype) for name, value in layer.per_expert.items()},
    )
