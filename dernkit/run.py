"""A run directory: the stages in order, each skipped if and only if its inputs match, outputs renamed when complete."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor

from dernkit import card, given
from dernkit.artifacts import (
    fresh,
    json_key,
    publish,
    read_json,
    refuse_broken,
    replace_folder,
    safetensors_key,
    sizes,
    whole,
)
from dernkit.components import Component
from dernkit.digest import file_digest, missing_paths
from dernkit.directory import EVAL, LOCK, MODEL, MOVES, PLAN, STATS, RunDirectory
from dernkit.errors import CheckpointError, RecipeError
from dernkit.gather import gather
from dernkit.kernel import calls
from dernkit.keys import Keys
from dernkit.models.architecture import use_architecture
from dernkit.models.device import CPU
from dernkit.models.export import check_export
from dernkit.models.folder import RECORD as MADE_FROM
from dernkit.models.source import SourceModel, open_source
from dernkit.parts import Parts
from dernkit.progress import Progress
from dernkit.recipe import CalibrateSpec, Recipe
from dernkit.registry import Registry
from dernkit.sentences import reason
from dernkit.stages import apply, calibrate, evaluate, journal, plan, sequential
from dernkit.types import LayerPlan, LayerStats

_VERSIONED = ("dernkit", "torch", "transformers", "safetensors")


@dataclass(slots=True)
class Run:
    """One recipe on one model, with its directory.

    Args:
        recipe: bound.
        model: the name that the user gave (a directory or a hub id), for the record.
        path: the model's directory.
        out: the run directory; made if it does not exist.
        registry: where the recipe's components come from.
        progress: where to report.
        trust_remote_code: whether code that comes with the model may run.
        statistics: the `stats.safetensors` of another run with this model, to be used instead of calibrating.
        device: where layers run and are compressed, and models evaluated.
    """

    recipe: Recipe
    model: str
    path: Path
    out: Path
    registry: Registry
    progress: Progress
    trust_remote_code: bool = False
    statistics: Path | None = None
    device: torch.device = CPU
    _architecture: Component | None = field(init=False, default=None)
    """That of the model, where a plugin brings it."""

    @property
    def _parts(self) -> Parts:
        return Parts(self.recipe, self.registry, self._architecture)

    @property
    def _place(self) -> RunDirectory:
        return RunDirectory(self.out)

    def execute(self) -> Path:
        """All stages; returns the report's path.

        Raises:
            DernkitError: with one sentence; what earlier stages made stays, no half output does.
        """
        try:
            with self.registry.naming_plugins():
                return self._execute()
        except (OSError, SafetensorError) as error:
            raise CheckpointError(
                f"{getattr(error, 'filename', None) or self.out}: must be readable and writable while a run lasts. "
                f"Got '{getattr(error, 'strerror', None) or reason(error)}' instead. "
                f"Once that is mended, the same command goes on where it was."
            ) from error

    def _execute(self) -> Path:
        self._place.check(self.path)
        self._check_files()
        self._architecture = use_architecture(self.path, self.registry.components("architecture"))
        source = open_source(
            self.path, self._parts.adapters(), trust_remote_code=self.trust_remote_code, device=self.device
        )
        plan.check_keep(source, self.recipe.plan)
        apply.check_new_width(source.outline[1], self.recipe.apply.width)
        check_export(source.outline[1], self.recipe.apply.export)
        fingerprint = source.fingerprint()
        self._check_statistics(fingerprint)
        with self._place.locked():
            self._write_lock(fingerprint)
            keys = Keys(self.recipe, self._parts, self.path, self.out, fingerprint)
            stats = self._calibrate(source, keys)
            self._plan(source, stats, keys)
            self._apply(source, stats, keys)
            self._evaluate(keys)
            report = self._report(source)
            self._place.tidy()
            return report

    def _check_files(self) -> None:
        """Files that the recipe names are there before anything expensive starts."""
        reads: list[tuple[str, Any]] = [(f"evaluate.{i}", part) for i, part in enumerate(self.recipe.evaluators)]
        if self._calibrates and self.recipe.calibrate is not None:
            reads.append(("calibrate.source", self.recipe.calibrate.source))
        for where, component in reads:
            refuse_missing(where, component)

    @property
    def _calibrates(self) -> bool:
        return bool(self.recipe.requires) and self.statistics is None

    @property
    def _sequential(self) -> bool:
        return self.recipe.calibrate is not None and self.recipe.calibrate.sequential

    def _check_statistics(self, fingerprint: str) -> None:
        """Those of another run are good before anything is written."""
        if self.statistics is None or not self.recipe.requires:
            return
        if self._sequential:
            raise RecipeError(
                "calibrate.sequential: statistics must be collected while the layers are compressed as this recipe "
                "says. Got --statistics with those of another run instead. Leave out one of the two."
            )
        command = f"dernkit run {self.recipe.path or 'RECIPE'} --model {self.model} --out {self.out}"
        given.check_given(self.statistics, fingerprint, self._parts.readers(), command)

    def _write_lock(self, fingerprint: str) -> None:
        lock = {
            "recipe": self.recipe.resolved(),
            "model": {"name": self.model, "fingerprint": fingerprint},
            "components": self._parts.origins(),
            "versions": {name: metadata.version(name) for name in _VERSIONED},
            "device": str(self.device),
        }
        if self.statistics is not None and self.recipe.requires:
            lock["statistics"] = str(self.statistics)
        text = yaml.safe_dump(lock, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
        self._place.write(LOCK, text)

    def _calibrate(self, source: SourceModel, keys: Keys) -> dict[int, LayerStats]:
        spec, requires = self.recipe.calibrate, self.recipe.requires
        if spec is None or not requires:
            return {}
        if self.statistics is not None:
            self._copy_statistics(self.statistics)
            return calibrate.load_stats(self.out / STATS)
        # `routed` is always counted: the report names experts that saw no token.
        requires = requires | {"routed"}
        key = keys.statistics(spec, requires)

        def work() -> None:
            batches = calibration_batches(source, spec, self.recipe.seed)
            options: Any = {"sample_size": spec.sample, "seed": self.recipe.seed, "progress": self.progress}
            options["held_out"] = spec.held_out(sum(batch.numel() for batch in batches))
            plans = None
            if self._sequential:
                how = (self.recipe.plan, self.recipe.apply)
                stats, plans = sequential.calibrate_checkpoint(source, batches, requires, *how, **options)
            else:
                stats = calibrate.calibrate_checkpoint(source, batches, requires, **options)
            with self._place.renamed(STATS) as file:
                calibrate.save_stats(stats, file, key)
            if plans is not None:  # a run that is killed before this makes the same plans from the statistics
                self._save_plan(plans, stats, keys)

        refuse_broken(self.out / PLAN)
        self._place.stage("calibrate", safetensors_key(self.out / STATS) == key, work)
        return calibrate.load_stats(self.out / STATS)

    def _copy_statistics(self, file: Path) -> None:
        def work() -> None:
            with self._place.renamed(STATS) as copy:
                shutil.copyfile(file, copy)

        there = self.out / STATS
        self._place.stage("calibrate", there.exists() and file_digest(there) == file_digest(file), work)

    def _save_plan(self, plans: Sequence[LayerPlan], stats: Mapping[int, LayerStats], keys: Keys) -> None:
        key, made_from = keys.plan(calibrated=bool(stats))
        header = {
            "dernkit": 1,
            "key": key,
            "stats": made_from,
            "recipe": self.recipe.resolved()["plan"],
            "components": [c.provenance.origin for c in self._parts.components()],
        }
        folder = self._place.partial / "plan"
        fresh(folder)
        plan.save_plan(plans, folder, header, stats)
        publish(folder / MOVES, self.out / MOVES)
        publish(folder / PLAN, self.out / PLAN)

    def _plan(self, source: SourceModel, stats: dict[int, LayerStats], keys: Keys) -> None:
        def work() -> None:
            plans = plan.plan_checkpoint(source, self.recipe.plan, stats, self.progress)
            self._save_plan(plans, stats, keys)

        refuse_broken(self.out / PLAN)
        found = {json_key(self.out / PLAN), safetensors_key(self.out / MOVES)}
        self._place.stage("plan", found == {keys.plan(calibrated=bool(stats))[0]}, work)

    def _apply(self, source: SourceModel, stats: dict[int, LayerStats], keys: Keys) -> None:
        key = keys.apply()

        def work() -> None:
            folder = self._place.partial / MODEL
            if not journal.began(folder, key):
                fresh(folder)
            plans = plan.load_plan(self.out)
            applied = apply.apply_checkpoint(
                source,
                plans,
                self.recipe.apply.merge,
                self.recipe.apply.router,
                seed=self.recipe.seed,
                folder=folder,
                key=key,
                progress=self.progress,
                width=self.recipe.apply.width,
                mtp=self.recipe.apply.mtp,
                export=self.recipe.apply.export,
                stats=stats,
                refit=self.recipe.apply.refit,
            )
            quantisation = str(source.scheme) if source.scheme else None
            mtp = bool(source.mtp.tensors)
            text = card.render(self.model, self.recipe, plans, applied.export, mtp=mtp, quantisation=quantisation)
            (folder / "README.md").write_text(text, encoding="utf-8")
            record = {"key": key, "source": keys.fingerprint, "fits": applied.fits, "files": sizes(folder)}
            (folder / MADE_FROM).write_text(json.dumps(record) + "\n", encoding="utf-8")
            replace_folder(folder, self.out / MODEL)

        made = read_json(self.out / MODEL / MADE_FROM)
        self._place.stage("apply", made.get("key") == key and whole(self.out / MODEL, made.get("files", {})), work)

    def _evaluate(self, keys: Keys) -> None:
        evaluators = self.recipe.evaluators
        key, before_key = keys.evaluate()

        def work() -> None:
            earlier = read_json(self.out / EVAL)
            results = {"before": earlier["before"]} if earlier.get("before_key") == before_key else {}
            for name, path in (("before", self.path), ("after", self.out / MODEL)):
                if name not in results:
                    results[name] = evaluate.evaluate(
                        path,
                        evaluators,
                        self.progress,
                        what=name,
                        adapters=self._parts.adapters(),
                        trust_remote_code=self.trust_remote_code,
                        original=None if name == "before" else self.path,
                        device=self.device,
                    )
            self._place.write(EVAL, json.dumps({"key": key, "before_key": before_key, **results}, indent=1) + "\n")

        self._place.stage("evaluate", not evaluators or json_key(self.out / EVAL) == key, work)

    def _report(self, source: SourceModel) -> Path:
        report = self.recipe.report
        facts = gather(self.out, source, self.model, self.recipe)
        self._place.write(report.filename, calls.render(report, facts))
        return self.out / report.filename


def refuse_missing(where: str, component: Any) -> None:
    """Refuse a component whose files are not there.

    Raises:
        RecipeError: one is not.
    """
    for path in missing_paths(component):
        raise RecipeError(
            f"{where}: {path} must exist. Got a path where nothing is instead. "
            f"Correct the recipe, or override it with --set."
        )


def calibration_batches(source: SourceModel, spec: CalibrateSpec, seed: int) -> list[Tensor]:
    """Token ids [b, s] that a recipe's statistics are collected on, by the model's own tokenizer."""
    tokenizer = evaluate.load_tokenizer(source.path, trust_remote_code=source.trust_remote_code)
    rng = torch.Generator().manual_seed(seed)
    asked = (spec.source, tokenizer, spec.sequences, spec.length, rng)
    tokens = calls.tokens(*asked, writer=lambda: calibrate.writer_on_disk(source))
    calibrate.check_vocabulary(source, tokens)
    return calibrate.batched(tokens, spec.batch_size)
