"""A run directory: the stages in order, each skipped if and only if its inputs match, outputs renamed when complete."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError

from dernkit import card
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
from dernkit.digest import content_digests, digest, file_digest, missing_paths
from dernkit.directory import EVAL, LOCK, MODEL, MOVES, PLAN, STATS, RunDirectory
from dernkit.errors import CheckpointError, RecipeError
from dernkit.gather import gather
from dernkit.models.architecture import use_architecture
from dernkit.models.export import check_export
from dernkit.models.folder import RECORD as MADE_FROM
from dernkit.models.folder import other_files
from dernkit.models.source import SourceModel, open_source
from dernkit.progress import Progress
from dernkit.recipe import Recipe
from dernkit.registry import Registry
from dernkit.sentences import reason
from dernkit.stages import apply, calibrate, evaluate, journal, plan
from dernkit.types import LayerStats

_TOKENIZER = ("token*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken")
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
    """

    recipe: Recipe
    model: str
    path: Path
    out: Path
    registry: Registry
    progress: Progress
    trust_remote_code: bool = False
    _architecture: Component | None = field(init=False, default=None)
    """That of the model, where a plugin brings it."""

    @property
    def _place(self) -> RunDirectory:
        return RunDirectory(self.out)

    def execute(self) -> Path:
        """All stages; returns the report's path.

        Raises:
            DernkitError: with one sentence; what earlier stages made stays, no half output does.
        """
        try:
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
        source = open_source(self.path, self._adapters(), trust_remote_code=self.trust_remote_code)
        plan.check_keep(source, self.recipe.plan)
        apply.check_new_width(source.outline[1], self.recipe.apply.width)
        check_export(source.outline[1], self.recipe.apply.export)
        with self._place.locked():
            fingerprint = source.fingerprint()
            self._write_lock(fingerprint)
            stats = self._calibrate(source, fingerprint)
            self._plan(source, stats, fingerprint)
            self._apply(source, stats, fingerprint)
            self._evaluate(fingerprint)
            report = self._report(source)
            self._place.tidy()
            return report

    def _adapters(self) -> list[Any]:
        return [component.cls() for component in self.registry.components("adapter")]

    def _check_files(self) -> None:
        """Files that the recipe names are there before anything expensive starts."""
        reads: list[tuple[str, Any]] = [(f"evaluate.{i}", part) for i, part in enumerate(self.recipe.evaluators)]
        if self.recipe.calibrate is not None and self.recipe.requires:
            reads.append(("calibrate.source", self.recipe.calibrate.source))
        for where, component in reads:
            for path in missing_paths(component):
                raise RecipeError(
                    f"{where}: {path} must exist. Got a path where nothing is instead. "
                    f"Correct the recipe, or override it with --set."
                )

    def _write_lock(self, fingerprint: str) -> None:
        resolved = self.recipe.resolved()
        origins: list[dict[str, Any]] = [
            asdict(c.provenance) | {"file": Path(c.provenance.file).name, "kind": c.kind, "name": c.name}
            for c in self.components()
        ]
        lock = {
            "recipe": resolved,
            "model": {"name": self.model, "fingerprint": fingerprint},
            "components": origins,
            "versions": {name: metadata.version(name) for name in _VERSIONED},
        }
        text = yaml.safe_dump(lock, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None)
        self._place.write(LOCK, text)

    def components(self) -> list[Any]:
        """Registered components of everything that the recipe uses, nested ones included, by kind and name."""
        recipe = self.recipe
        parts: list[tuple[str, Any]] = [("scorer", recipe.plan.scorer), ("budget", recipe.plan.budget)]
        parts += [("selector", recipe.plan.selector), ("assigner", recipe.plan.assigner)]
        parts += [("merge", recipe.apply.merge), ("router", recipe.apply.router), ("report", recipe.report)]
        parts += [("evaluator", evaluator) for evaluator in recipe.evaluators]
        parts += [("source", recipe.calibrate.source)] if recipe.calibrate else []
        parts += [("adapter", adapter) for adapter in self._adapters()]
        used = {self._architecture} if self._architecture else set()
        while parts:
            kind, part = parts.pop()
            if part is None:
                continue
            component = self.registry.get(kind, part.name)
            used.add(component)
            parts += [(option.nested, getattr(part, option.name)) for option in component.options if option.nested]
        return sorted(used, key=lambda component: (component.kind, component.name))

    def _versions(self, *kinds: str) -> list[Any]:
        """What makes a stage's code: dernkit's version and those of the plugins that take part (the model's does)."""
        taking_part = [c.provenance for c in self.components() if c.kind in (*kinds, "architecture")]
        return [metadata.version("dernkit"), sorted({f"{p.distribution} {p.version}" for p in taking_part})]

    def _calibrate(self, source: SourceModel, fingerprint: str) -> dict[int, LayerStats]:
        spec, requires = self.recipe.calibrate, self.recipe.requires
        if spec is None or not requires:
            return {}
        # `routed` is always counted: the report names experts that saw no token.
        requires = requires | {"routed"}
        key = digest(
            self.recipe.resolved()["calibrate"],
            content_digests(spec.source),
            sorted(requires),
            self.recipe.seed,
            fingerprint,
            [(file.name, file_digest(file)) for pattern in _TOKENIZER for file in sorted(self.path.glob(pattern))],
            self._versions("source", "adapter"),
        )

        def work() -> None:
            tokenizer = evaluate.load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)
            rng = torch.Generator().manual_seed(self.recipe.seed)
            tokens = spec.source.tokens(tokenizer, spec.sequences, spec.length, rng)
            calibrate.check_vocabulary(source, tokens)
            stats = calibrate.calibrate_checkpoint(
                source,
                calibrate.batched(tokens, spec.batch_size),
                requires,
                sample_size=spec.sample,
                seed=self.recipe.seed,
                progress=self.progress,
            )
            with self._place.renamed(STATS) as file:
                calibrate.save_stats(stats, file, key)

        self._place.stage("calibrate", safetensors_key(self.out / STATS) == key, work)
        return calibrate.load_stats(self.out / STATS)

    def _plan(self, source: SourceModel, stats: dict[int, LayerStats], fingerprint: str) -> None:
        made_from = file_digest(self.out / STATS) if stats else ""
        key = digest(
            self.recipe.resolved()["plan"],
            made_from,
            fingerprint,
            self._versions("scorer", "budget", "selector", "assigner", "similarity", "adapter"),
        )

        def work() -> None:
            plans = plan.plan_checkpoint(source, self.recipe.plan, stats, self.progress)
            header = {
                "dernkit": 1,
                "key": key,
                "stats": made_from,
                "recipe": self.recipe.resolved()["plan"],
                "components": [c.provenance.origin for c in self.components()],
            }
            folder = self._place.partial / "plan"
            fresh(folder)
            plan.save_plan(plans, folder, header, stats)
            publish(folder / MOVES, self.out / MOVES)
            publish(folder / PLAN, self.out / PLAN)

        refuse_broken(self.out / PLAN)
        keys = {json_key(self.out / PLAN), safetensors_key(self.out / MOVES)}
        self._place.stage("plan", keys == {key}, work)

    @property
    def _applies_statistics(self) -> bool:
        how = self.recipe.apply
        return bool(how.router.requires or (how.merge is not None and how.merge.requires))

    def _apply_key(self, fingerprint: str) -> str:
        return digest(
            self.recipe.resolved()["apply"],
            file_digest(self.out / PLAN),
            file_digest(self.out / MOVES),
            self.recipe.seed,
            fingerprint,
            file_digest(self.out / STATS) if self._applies_statistics else "",
            [(file.name, file_digest(file)) for file in other_files(self.path)],
            self._versions("merge", "router", "adapter"),
        )

    def _apply(self, source: SourceModel, stats: dict[int, LayerStats], fingerprint: str) -> None:
        key = self._apply_key(fingerprint)

        def work() -> None:
            folder = self._place.partial / MODEL
            if not journal.began(folder, key):
                fresh(folder)
            plans = plan.load_plan(self.out)
            result = apply.apply_checkpoint(
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
            )
            quantisation = str(source.scheme) if source.scheme else None
            mtp = bool(source.mtp.tensors)
            text = card.render(self.model, self.recipe, plans, result, mtp=mtp, quantisation=quantisation)
            (folder / "README.md").write_text(text, encoding="utf-8")
            record = {"key": key, "source": fingerprint, "files": sizes(folder)}
            (folder / MADE_FROM).write_text(json.dumps(record) + "\n", encoding="utf-8")
            replace_folder(folder, self.out / MODEL)

        made = read_json(self.out / MODEL / MADE_FROM)
        self._place.stage("apply", made.get("key") == key and whole(self.out / MODEL, made.get("files", {})), work)

    def _evaluate(self, fingerprint: str) -> None:
        evaluators = self.recipe.evaluators
        measured_by = digest(
            self.recipe.resolved()["evaluate"],
            [content_digests(evaluator) for evaluator in evaluators],
            self._versions("evaluator"),
        )
        key, before_key = digest(measured_by, self._apply_key(fingerprint)), digest(measured_by, fingerprint)

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
                        adapters=self._adapters(),
                        trust_remote_code=self.trust_remote_code,
                    )
            self._place.write(EVAL, json.dumps({"key": key, "before_key": before_key, **results}, indent=1) + "\n")

        self._place.stage("evaluate", not evaluators or json_key(self.out / EVAL) == key, work)

    def _report(self, source: SourceModel) -> Path:
        report = self.recipe.report
        facts = gather(self.out, source, self.model, self.recipe)
        self._place.write(report.filename, report.render(facts))
        return self.out / report.filename
