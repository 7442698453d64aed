"""Calibrate: token batches and a checkpoint in, statistics per MoE layer out, one decoder layer in memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from dernkit.api import Block
from dernkit.errors import CheckpointError
from dernkit.kernel.statistics import Accumulator
from dernkit.models.replay import Loader, replay
from dernkit.models.rerouting import routes_again
from dernkit.models.source import SourceModel
from dernkit.models.stack import Stack, decoder_stack
from dernkit.models.writing import ModelWriter
from dernkit.progress import Progress
from dernkit.types import LayerStats

_SAMPLE_SIZE, _HELD_OUT = "sample_size", "held_out"


def calibrate_checkpoint(
    source: SourceModel,
    batches: Sequence[Tensor],
    requires: frozenset[str],
    *,
    sample_size: int,
    seed: int,
    progress: Progress,
    first_token: int = 0,
    held_out: int = 0,
) -> dict[int, LayerStats]:
    """Statistics from disk, layer by layer.

    Args:
        source: the model.
        batches: token ids [b, s], int64, full sequences.
        requires: statistics to collect.
        sample_size: capacity of the reservoir of layer inputs.
        seed: seed of the reservoir.
        progress: where to report tokens.
        first_token: index of the first token in a longer stream; see :class:`Accumulator`.
        held_out: tokens at the end of which no component sees samples.
    """
    store, blocks = source.open()
    stack = decoder_stack(store.model, blocks)
    store.load_around(stack.owner_path, stack.paths)
    collector = Collector(
        blocks, requires, sample_size=sample_size, seed=seed, first_token=first_token, held_out=held_out
    )
    return collector.run(stack, batches, store, progress)


def calibrate_live(
    model: Any,
    blocks: Sequence[Block],
    batches: Sequence[Tensor],
    requires: frozenset[str],
    *,
    sample_size: int,
    seed: int,
    progress: Progress,
    first_token: int = 0,
    held_out: int = 0,
) -> dict[int, LayerStats]:
    """The same statistics, bit for bit, from a model that is whole in memory."""
    collector = Collector(
        blocks, requires, sample_size=sample_size, seed=seed, first_token=first_token, held_out=held_out
    )
    with eager_experts(model):
        return collector.run(decoder_stack(model, blocks), batches, Live(), progress)


def writer_on_disk(source: SourceModel) -> ModelWriter:
    """The model on disk, one decoder layer in memory, to write text with."""
    store, blocks = source.open()
    stack = decoder_stack(store.model, blocks)
    store.load_outside(stack.paths)
    return ModelWriter(store.model, stack, store)


def live_writer(model: Any, blocks: Sequence[Block]) -> ModelWriter:
    """The same text, bit for bit, from a model that is whole in memory and under `eager_experts`."""
    return ModelWriter(model, decoder_stack(model, blocks), Live())


class Live:
    """The loader of a model that is whole in memory."""

    def load(self, prefix: str) -> None:
        """Already there."""

    def unload(self, prefix: str) -> None:
        """Stays."""


@contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """The plain implementation, which takes every width; the model's own choice comes back afterwards."""
    before = model.config._experts_implementation
    training = model.training
    model.set_experts_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        model.train(training)


class Collector:
    """Attaches an accumulator to each MoE block while its decoder layer runs."""

    def __init__(
        self,
        blocks: Sequence[Block],
        requires: frozenset[str],
        *,
        sample_size: int,
        seed: int,
        first_token: int = 0,
        held_out: int = 0,
    ) -> None:
        self._blocks = {block.layer: block for block in blocks}
        self._reroutable: dict[int, bool] = {}
        """By layer: whether what a router does follows from what it was seen to get."""
        if len(self._blocks) != len(blocks):
            raise CheckpointError(
                "calibration: a decoder layer must have one MoE block. Got a layer with several instead."
            )
        how: Any = {"sample_size": sample_size, "seed": seed, "first_token": first_token, "held_out": held_out}
        self._accumulators = {block.layer: Accumulator(block.dims, requires, **how) for block in blocks}

    def run(self, stack: Stack, batches: Sequence[Tensor], loader: Loader, progress: Progress) -> dict[int, LayerStats]:
        """Replay all batches and return the statistics by decoder layer."""
        count = len(stack.layers)
        with progress.track("calibrate", count * sum(batch.numel() for batch in batches), "tokens") as tracker:
            replay(
                stack.owner,
                stack.layers,
                stack.paths,
                batches,
                loader,
                self.observe,
                lambda layer, tokens: tracker.advance(tokens, f"layer {layer + 1}/{count}"),
            )
        return {layer: self.stats(layer) for layer in self._accumulators}

    def stats(self, layer: int) -> LayerStats:
        """What has been collected of a layer's block."""
        return self._accumulators[layer].stats()

    def observe(self, layer: int) -> AbstractContextManager[None]:
        """Hooks on the layer's block, if it has one."""
        return self._hooked(layer)

    @contextmanager
    def _hooked(self, layer: int) -> Iterator[None]:
        if layer not in self._blocks:
            yield
            return
        block, accumulator = self._blocks[layer], self._accumulators[layer]
        bank = block.bank()
        seen: list[Tensor] = []

        def add(inputs: Tensor, chosen: Tensor, coefficients: Tensor) -> None:
            router_inputs = seen.pop() if seen else None
            if router_inputs is not None:
                if layer not in self._reroutable:
                    self._reroutable[layer] = routes_again(bank, router_inputs, chosen, coefficients)
                if not self._reroutable[layer]:
                    router_inputs = router_inputs[:, :0]
                elif torch.equal(router_inputs, inputs):
                    router_inputs = None
            accumulator.update(bank, inputs, chosen, coefficients, router_inputs)

        handles = [block.on_routing(add)]
        if accumulator.samples:
            handles.append(block.on_router_inputs(seen.append))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def _finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def check_vocabulary(source: SourceModel, tokens: Tensor) -> None:
    """Refuse a tokenizer that is not the model's.

    Raises:
        CheckpointError: it gave a token that the model has no embedding for, or config.json says no number of tokens.
    """
    rows = getattr(source.config.get_text_config(), "vocab_size", None)
    if type(rows) is not int:
        raise CheckpointError(
            f"{source.path / 'config.json'}: must have 'vocab_size', the number of known tokens. Got none instead. "
            f"A plugin's config class may say in its attribute_map what the field is called."
        )
    if int(tokens.max()) >= rows:
        raise CheckpointError(
            f"{source.path}: the tokenizer must give tokens below {rows}, the model's vocabulary. "
            f"Got {int(tokens.max())} instead. Take model and tokenizer from the same download."
        )


def batched(tokens: Tensor, batch_size: int) -> list[Tensor]:
    """[sequences, length] in batches of at most ``batch_size`` sequences."""
    return list(tokens.split(batch_size))


def save_stats(stats: Mapping[int, LayerStats], file: Path, key: str) -> None:
    """Write `layers.<index>.<statistic>` tensors; ``tokens``, `sample_size` and `held_out` are int64 scalars.

    The file's only metadata is ``key``, the digest of what it was made from (several come out in random order).

    Raises:
        CheckpointError: a statistic is NaN or infinite.
    """
    refuse_non_finite(stats)
    sample_size = max((values.sample_size for values in stats.values()), default=0)
    held_out = max((values.held_out for values in stats.values()), default=0)
    tensors = {_SAMPLE_SIZE: torch.tensor(sample_size), _HELD_OUT: torch.tensor(held_out)}
    for layer, values in stats.items():
        tensors[f"layers.{layer}.tokens"] = torch.tensor(values.tokens)
        tensors |= {f"layers.{layer}.{name}": value.contiguous() for name, value in values.values.items()}
    save_file(tensors, file, metadata={"key": key})


def refuse_non_finite(stats: Mapping[int, LayerStats]) -> None:
    """Nothing is decided by statistics that are no numbers.

    Raises:
        CheckpointError: a statistic is NaN or infinite.
    """
    for layer, values in stats.items():
        for name, value in values.values.items():
            if not _finite(value):
                raise CheckpointError(
                    f"statistics: must be finite. Got NaN or infinity in 'layers.{layer}.{name}' instead. The model "
                    f"overflows on this text: set 'dtype' in config.json to float32, or take other text."
                )


def load_stats(file: Path) -> dict[int, LayerStats]:
    """Read what `save_stats` wrote.

    Raises:
        CheckpointError: a statistic is NaN or infinite.
    """
    tokens: dict[int, int] = {}
    values: dict[int, dict[str, Tensor]] = {}
    with safe_open(file, "pt") as stored:
        sample_size = int(stored.get_tensor(_SAMPLE_SIZE))
        held_out = int(stored.get_tensor(_HELD_OUT)) if _HELD_OUT in stored.keys() else 0  # noqa: SIM118
        for key in stored.keys():  # noqa: SIM118 (a safetensors handle, not a dict)
            if key in (_SAMPLE_SIZE, _HELD_OUT):
                continue
            _, layer, name = key.split(".", 2)
            tensor = stored.get_tensor(key)
            if not _finite(tensor):
                raise CheckpointError(
                    f"{file}: statistics must be finite. Got NaN or infinity in '{key}' instead. Delete the file and "
                    f"run again."
                )
            if name == "tokens":
                tokens[int(layer)] = int(tensor)
            else:
                values.setdefault(int(layer), {})[name] = tensor
    return {layer: LayerStats(tokens[layer], values.get(layer, {}), sample_size, held_out) for layer in sorted(tokens)}
