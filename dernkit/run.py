"""A run directory: the stages in order, each skipped if and only if its inputs match, outputs renamed when complete."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError, safe_open

from dernkit import card
from dernkit.digest import content_digests, digest, file_digest
from dernkit.errors import CheckpointError, RecipeError
from dernkit.gather import gather
from dernkit.memory import measured
from dernkit.models.source import SourceModel, open_source
from dernkit.progress import Progress
from dernkit.recipe import Recipe
from dernkit.registry import Registry
from dernkit.stages import apply, calibrate, evaluate, plan
from dernkit.types import LayerStats

LOCK, STATS, PLAN, MODEL, EVAL, RECORD = (
    "recipe.lock.yaml",
    "stats.safetensors",
    "plan.json",
    "model",
    "eval.json",
    "run.json",
)
_PARTIAL, _LOCK_FILE = ".partial", ".lock"
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

    def execute(self) -> Path:
        """All stages; returns the report's path.

        Raises:
            DernkitError: with one sentence; what earlier stages made stays, no half output does.
        """
        self._check_out()
        source = open_source(self.path, self._adapters(), trust_remote_code=self.trust_remote_code)
        plan.check_keep(source, self.recipe.plan)
        self.out.mkdir(parents=True, exist_ok=True)
        with _exclusive(self.out / _LOCK_FILE):
            fingerprint = source.fingerprint()
            self._write_lock(fingerprint)
            stats = self._calibrate(source, fingerprint)
            self._plan(source, stats, fingerprint)
            self._apply(source, fingerprint)
            self._evaluate(fingerprint)
            report = self._report()
            shutil.rmtree(self.out / _PARTIAL, ignore_errors=True)
            return report

    def _adapters(self) -> list[Any]:
        return [component.cls() for component in self.registry.components("adapter")]

    def _check_out(self) -> None:
        out, path = self.out.resolve(), self.path.resolve()
        if out == path or path in out.parents:
            raise CheckpointError(
                f"--out: must lie outside the model's directory. Got '{self.out}', which is inside '{self.path}', "
                f"instead. Choose another directory."
            )
        if out.exists() and not out.is_dir():
            raise CheckpointError(f"--out: must be a directory. Got the file '{self.out}' instead.")
        if out.is_dir() and any(out.iterdir()) and not (out / LOCK).exists() and not (out / _LOCK_FILE).exists():
            raise CheckpointError(
                f"--out: must be empty, new, or an earlier run. Got '{self.out}', which holds other files, instead. "
                f"Choose another directory."
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
        with self._renamed(LOCK) as file:
            file.write_text(text, encoding="utf-8")

    def components(self) -> list[Any]:
        """Registered components of everything that the recipe uses, nested ones included, by kind and name."""
        recipe = self.recipe
        parts: list[tuple[str, Any]] = [("scorer", recipe.plan.scorer), ("budget", recipe.plan.budget)]
        parts.append(("assigner", recipe.plan.assigner))
        parts += [("merge", recipe.apply.merge), ("router", recipe.apply.router), ("report", recipe.report)]
        parts += [("evaluator", evaluator) for evaluator in recipe.evaluators]
        parts += [("source", recipe.calibrate.source)] if recipe.calibrate else []
        parts += [("adapter", adapter) for adapter in self._adapters()]
        used = set()
        while parts:
            kind, part = parts.pop()
            if part is None:
                continue
            component = self.registry.get(kind, part.name)
            used.add(component)
            parts += [(option.nested, getattr(part, option.name)) for option in component.options if option.nested]
        return sorted(used, key=lambda component: (component.kind, component.name))

    def _versions(self, *kinds: str) -> list[Any]:
        """What makes a stage's code: dernkit's version and those of the plugins that take part."""
        taking_part = [c.provenance for c in self.components() if c.kind in kinds]
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
            [file_digest(file) for file in sorted(self.path.glob("token*"))],
            self._versions("source", "adapter"),
        )

        def work() -> None:
            tokenizer = evaluate.load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)
            rng = torch.Generator().manual_seed(self.recipe.seed)
            tokens = spec.source.tokens(tokenizer, spec.sequences, spec.length, rng)
            stats = calibrate.calibrate_checkpoint(
                source,
                calibrate.batched(tokens, spec.batch_size),
                requires,
                sample_size=spec.sample,
                seed=self.recipe.seed,
                progress=self.progress,
            )
            with self._renamed(STATS) as file:
                calibrate.save_stats(stats, file, {"key": key})

        self._stage("calibrate", _safetensors_key(self.out / STATS) == key, work)
        return calibrate.load_stats(self.out / STATS)

    def _plan(self, source: SourceModel, stats: dict[int, LayerStats], fingerprint: str) -> None:
        made_from = file_digest(self.out / STATS) if stats else ""
        key = digest(
            self.recipe.resolved()["plan"],
            made_from,
            fingerprint,
            self._versions("scorer", "budget", "assigner", "similarity", "adapter"),
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
            folder = self.out / _PARTIAL / "plan"
            _fresh(folder)
            plan.save_plan(plans, folder, header, stats)
            _publish(folder / "plan.safetensors", self.out / "plan.safetensors")
            _publish(folder / PLAN, self.out / PLAN)

        self._stage("plan", _json_key(self.out / PLAN) == key and (self.out / "plan.safetensors").exists(), work)

    def _apply_key(self, fingerprint: str) -> str:
        return digest(
            self.recipe.resolved()["apply"],
            file_digest(self.out / PLAN),
            file_digest(self.out / "plan.safetensors"),
            self.recipe.seed,
            fingerprint,
            self._versions("merge", "router", "adapter"),
        )

    def _apply(self, source: SourceModel, fingerprint: str) -> None:
        key = self._apply_key(fingerprint)

        def work() -> None:
            folder = self.out / _PARTIAL / MODEL
            folder.mkdir(parents=True, exist_ok=True)
            plans = plan.load_plan(self.out)
            apply.apply_checkpoint(
                source,
                plans,
                self.recipe.apply.merge,
                self.recipe.apply.router,
                seed=self.recipe.seed,
                folder=folder,
                key=key,
                progress=self.progress,
            )
            (folder / "README.md").write_text(card.render(self.model, self.recipe, plans), encoding="utf-8")
            made_from = {"key": key, "source": fingerprint}
            (folder / "dernkit.json").write_text(json.dumps(made_from) + "\n", encoding="utf-8")
            _replace_folder(folder, self.out / MODEL)

        self._stage("apply", _json_key(self.out / MODEL / "dernkit.json") == key, work)

    def _evaluate(self, fingerprint: str) -> None:
        evaluators = self.recipe.evaluators
        key = digest(
            self.recipe.resolved()["evaluate"],
            [content_digests(evaluator) for evaluator in evaluators],
            self._apply_key(fingerprint),
            self._versions("evaluator"),
        )

        def work() -> None:
            results = {
                name: evaluate.evaluate(
                    path, evaluators, self.progress, what=name, trust_remote_code=self.trust_remote_code
                )
                for name, path in (("before", self.path), ("after", self.out / MODEL))
            }
            with self._renamed(EVAL) as file:
                file.write_text(json.dumps({"key": key, **results}, indent=1) + "\n", encoding="utf-8")

        self._stage("evaluate", not evaluators or _json_key(self.out / EVAL) == key, work)

    def _report(self) -> Path:
        report = self.recipe.report
        facts = gather(self.out, self.path, self.model, self._adapters(), self.recipe, self.trust_remote_code)
        with self._renamed(report.filename) as file:
            file.write_text(report.render(facts), encoding="utf-8")
        return self.out / report.filename

    def _stage(self, name: str, done: bool, work: Callable[[], None]) -> None:
        if done:
            return
        (self.out / _PARTIAL).mkdir(exist_ok=True)
        with measured() as cost:
            work()
        file = self.out / RECORD
        record = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {"stages": {}}
        record["stages"][name] = asdict(cost)
        with self._renamed(RECORD) as new:
            new.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @contextmanager
    def _renamed(self, name: str) -> Iterator[Path]:
        """A temporary file that takes its place when the block ends without an error."""
        temporary = self.out / _PARTIAL / name
        temporary.parent.mkdir(exist_ok=True)
        yield temporary
        _publish(temporary, self.out / name)


@contextmanager
def _exclusive(file: Path) -> Iterator[None]:
    """Refuse a second run in the same directory."""
    import fcntl

    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RecipeError(
                f"--out: one run at a time may write '{file.parent}'. Got a second one instead. Wait for the first."
            ) from None
        yield


def _publish(file: Path, place: Path) -> None:
    """Rename a finished file into place, readable as the umask says (safetensors writes 0600)."""
    umask = os.umask(0)
    os.umask(umask)
    file.chmod(0o666 & ~umask)
    os.replace(file, place)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _replace_folder(new: Path, place: Path) -> None:
    old = new.with_name(new.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        os.replace(place, old)
    os.replace(new, place)
    shutil.rmtree(old, ignore_errors=True)


def _json_key(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("key")
    except (OSError, ValueError):
        return None


def _safetensors_key(file: Path) -> str | None:
    try:
        with safe_open(file, "pt") as stored:
            return (stored.metadata() or {}).get("key")
    except (OSError, SafetensorError):
        return None
