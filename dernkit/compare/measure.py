"""The work of one process of a comparison: it keeps the last model and calibration, and measures cell by cell."""

from __future__ import annotations

import copy
import fcntl
import gc
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dernkit.api import Block, Evaluator, Observations, Observing
from dernkit.api import Subject as Measured
from dernkit.artifacts import publish, safetensors_key
from dernkit.compare.bench import evaluator_names
from dernkit.compare.cells import ALWAYS, Cell, Context, Growth, Subject
from dernkit.compare.facts import layer_facts, live_sizes, moved_share, similarity
from dernkit.compare.remember import Memory
from dernkit.compare.rows import LayerFacts, Row
from dernkit.compare.stability import grow
from dernkit.compression import compress_bound
from dernkit.errors import DernkitError
from dernkit.kernel import calls
from dernkit.models.architecture import use_architecture
from dernkit.models.device import CPU
from dernkit.models.loading import load_checked
from dernkit.models.source import SourceModel, read_source
from dernkit.models.stack import find_blocks
from dernkit.progress import Silent
from dernkit.registry import Registry
from dernkit.stages.calibrate import (
    batched,
    calibrate_live,
    check_vocabulary,
    eager_experts,
    live_writer,
    load_stats,
    save_stats,
)
from dernkit.stages.evaluate import load_tokenizer
from dernkit.types import CompressedLayer, LayerPlan, LayerStats

Sizes = tuple[int, int, int]


@dataclass(slots=True)
class _Loaded:
    """A model in memory."""

    fingerprint: str
    source: SourceModel
    """Its config and headers."""
    model: Any
    """In its own dtype, never changed."""
    blocks: list[Block]
    sizes: Sizes
    original: Measured
    """In float32; remembers."""
    memory: Memory


@dataclass(slots=True)
class Laboratory:
    """What measures, and what it has at hand."""

    registry: Registry
    statistics: Path
    """Folder of calibrations."""
    trust_remote_code: bool = False
    device: torch.device = CPU
    _loaded: _Loaded | None = field(init=False, default=None)
    _stats: tuple[str, dict[int, LayerStats]] = field(init=False, default=("", {}))

    def measure(self, cell: Cell) -> Row:
        """One row.

        Raises:
            DernkitError: the model cannot be loaded, calibrated or, as it is, measured. What is refused for a recipe is
                a row that says so.
        """
        with self.registry.naming_plugins():
            if cell.recipe is None:
                return self._original(cell)
            stats = self._calibrated(cell.context)
        try:
            with self.registry.naming_plugins():
                return self._compressed(cell, stats)
        except DernkitError as error:
            return _row(cell, (0, 0, 0), refused=str(error))

    def grow(self, growth: Growth) -> list[dict[str, Any]]:
        """Scores as the calibration tokens grow; see `dernkit.compare.stability`."""
        with self.registry.naming_plugins():
            loaded = self._load(growth.context.subject)
            return grow(loaded.model, loaded.blocks, torch.cat(self._tokens(growth.context)), growth)

    def _original(self, cell: Cell) -> Row:
        loaded = self._load(cell.context.subject)
        observations, metrics = _observed(cell.context.subject.evaluators, loaded.original)
        details = cell.details | similarity(loaded.blocks)
        return _row(cell, cell.context.subject.sizes, observations=observations, metrics=metrics, details=details)

    def _compressed(self, cell: Cell, stats: Mapping[int, LayerStats]) -> Row:
        subject, recipe = cell.context.subject, cell.recipe
        loaded = self._load(subject)
        assert recipe is not None and recipe.calibrate is not None
        layers: list[LayerFacts] = []
        names: set[str] = set()

        def seen(block: Block, plan: LayerPlan, compressed: CompressedLayer, stats: LayerStats) -> None:
            names.update(block.expert_tensors())
            layers.append(layer_facts(block, plan, compressed, stats))

        model = copy.deepcopy(loaded.model)
        sequential = recipe.calibrate.sequential
        plans = compress_bound(
            model,
            recipe,
            self._tokens(cell.context) if sequential else [],
            self.registry,
            Silent(),
            given=None if sequential else stats,
            requires=ALWAYS,
            seen=seen,
        )
        live = live_sizes(model, frozenset(names))
        parameters, size, experts = (x - y + z for x, y, z in zip(subject.sizes, loaded.sizes, live, strict=True))
        original = loaded.original
        compressed = Measured(model.float(), original.tokenizer, original.path, lambda: original)
        with Memory().attached(model):  # evaluators look at the same texts
            observations, metrics = _observed(subject.evaluators, compressed)
        del compressed, model
        gc.collect()  # modules refer to each other in circles, and models are large
        return _row(
            cell,
            (parameters, size, experts),
            moved=moved_share(plans),
            layers=tuple(layers),
            observations=observations,
            metrics=metrics,
        )

    def _load(self, subject: Subject) -> _Loaded:
        if self._loaded is None or self._loaded.fingerprint != subject.fingerprint:
            if self._loaded is not None:  # it goes before the next one takes its place
                self._loaded.memory.detach(self._loaded.original.model)
                self._loaded = None
            use_architecture(subject.path, self.registry.components("architecture"))
            adapters = [component.cls() for component in self.registry.components("adapter")]
            tokenizer = load_tokenizer(subject.path, trust_remote_code=self.trust_remote_code)
            model = load_checked(subject.path, adapters, trust_remote_code=self.trust_remote_code).to(self.device)
            blocks = find_blocks(model, adapters)
            sizes = live_sizes(model, frozenset(name for block in blocks for name in block.expert_tensors()))
            original = Measured(copy.deepcopy(model).float(), tokenizer, subject.path)
            memory = Memory()
            memory.attach(original.model)
            source = read_source(subject.path, trust_remote_code=self.trust_remote_code)
            self._loaded = _Loaded(subject.fingerprint, source, model, blocks, sizes, original, memory)
        return self._loaded

    def _tokens(self, context: Context) -> list[Tensor]:
        loaded, spec = self._load(context.subject), context.spec
        assert spec is not None
        rng = torch.Generator().manual_seed(context.seed)
        asked = (spec.source, loaded.original.tokenizer, spec.sequences, spec.length, rng)
        with eager_experts(loaded.model):
            tokens = calls.tokens(*asked, writer=lambda: live_writer(loaded.model, loaded.blocks))
        check_vocabulary(loaded.source, tokens)
        return batched(tokens, spec.batch_size)

    def _calibrated(self, context: Context) -> dict[int, LayerStats]:
        """Statistics of all layers: at hand, from the file, or collected and put there (by one process)."""
        if self._stats[0] != context.key:
            self._stats = ("", {})
            file = statistics_file(self.statistics, context)
            with _waiting(file.with_suffix(".lock")):
                if safetensors_key(file) != context.key:
                    self._calibrate(context, file)
            self._stats = (context.key, load_stats(file))
        return self._stats[1]

    def _calibrate(self, context: Context, file: Path) -> None:
        loaded, spec = self._load(context.subject), context.spec
        assert spec is not None
        batches = self._tokens(context)
        stats = calibrate_live(
            loaded.model,
            loaded.blocks,
            batches,
            context.requires,
            sample_size=spec.sample,
            seed=context.seed,
            progress=Silent(),
            held_out=spec.held_out(sum(batch.numel() for batch in batches)),
        )
        partial = file.with_suffix(f".{os.getpid()}.partial")
        save_stats(stats, partial, context.key)
        publish(partial, file)


def statistics_file(folder: Path, context: Context) -> Path:
    """Where the statistics of a context lie; ``dernkit run --statistics`` takes the file."""
    return folder / f"{context.key.rpartition('.')[2][:16]}.safetensors"


@contextmanager
def _waiting(file: Path) -> Iterator[None]:
    """One process at a time; the others wait."""
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _observed(evaluators: Sequence[Evaluator], subject: Measured) -> tuple[dict[str, Observations], dict[str, float]]:
    """What all evaluators see, and all numbers of it."""
    observations: dict[str, Observations] = {}
    metrics: dict[str, float] = {}
    for name, evaluator in zip(evaluator_names(evaluators), evaluators, strict=True):
        if not isinstance(evaluator, Observing):
            found = calls.evaluate(evaluator, subject)
            metrics |= {f"{name}/{metric}": float(value) for metric, value in found.items()}
            continue
        for metric, seen in calls.observe(evaluator, subject).items():
            place = f"{name}/{metric}"
            observations[place] = seen
            metrics[place] = seen.mean()
            metrics |= {f"{place}/{group}": value for group, value in seen.by_group().items()}
    return observations, metrics


def _row(cell: Cell, sizes: Sizes, **measured: Any) -> Row:
    parameters, size, experts = sizes
    given: dict[str, Any] = {"refused": "", "moved": 0.0, "details": cell.details, **measured}
    return Row(
        key=cell.key,
        model=cell.context.subject.name,
        recipe=cell.label,
        keep=cell.keep,
        calibration=cell.context.calibration,
        seed=cell.context.seed,
        parameters=parameters,
        bytes=size,
        expert_bytes=experts,
        **given,
    )
