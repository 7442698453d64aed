"""What each stage of a run is made from, as a digest: a stage is skipped if and only if its output carries the same."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dernkit import given
from dernkit.digest import content_digests, digest, file_digest
from dernkit.directory import MOVES, PLAN, STATS
from dernkit.models.folder import TOKENIZER, other_files
from dernkit.parts import ACTING, DECIDING, Parts
from dernkit.recipe import CalibrateSpec, Recipe


@dataclass(frozen=True, slots=True)
class Keys:
    """The digests of one recipe on one model.

    Args:
        recipe: bound.
        parts: its components.
        path: the model's directory.
        out: the run directory.
        fingerprint: of the model.
    """

    recipe: Recipe
    parts: Parts
    path: Path
    out: Path
    fingerprint: str

    def statistics(self, spec: CalibrateSpec, requires: frozenset[str]) -> str:
        """Of statistics that the run collects."""
        resolved = self.recipe.resolved()
        surgery = {name: resolved["apply"].get(name) for name in ("merge", "router", "refit", "width")}
        made_from = digest(
            resolved["calibrate"],
            content_digests(spec.source),
            sorted(requires),
            self.recipe.seed,
            self.fingerprint,
            [(file.name, file_digest(file)) for pattern in TOKENIZER for file in sorted(self.path.glob(pattern))],
            self.parts.versions("source", "adapter"),
            # Then the statistics are made with the plan, and with what it makes of the layers.
            [resolved["plan"], surgery, self.parts.versions(*DECIDING, *ACTING)] if spec.sequential else [],
        )
        return given.stats_key(self.fingerprint, made_from, sequential=spec.sequential)

    def plan(self, *, calibrated: bool) -> tuple[str, str]:
        """Of the plan, and of the statistics that it was made from."""
        made_from = file_digest(self.out / STATS) if calibrated else ""
        resolved = self.recipe.resolved()["plan"]
        return digest(resolved, made_from, self.fingerprint, self.parts.versions(*DECIDING, "adapter")), made_from

    def apply(self) -> str:
        """Of the result."""
        how = self.recipe.apply
        reads = any(part.requires for part in (how.merge, how.router, how.refit) if part is not None)
        return digest(
            self.recipe.resolved()["apply"],
            file_digest(self.out / PLAN),
            file_digest(self.out / MOVES),
            self.recipe.seed,
            self.fingerprint,
            file_digest(self.out / STATS) if reads else "",
            [(file.name, file_digest(file)) for file in other_files(self.path)],
            self.parts.versions(*ACTING, "adapter"),
        )

    def evaluate(self) -> tuple[str, str]:
        """Of all measurements, and of those of the original."""
        measured_by = digest(
            self.recipe.resolved()["evaluate"],
            [content_digests(evaluator) for evaluator in self.recipe.evaluators],
            self.parts.versions("evaluator"),
        )
        return digest(measured_by, self.apply()), digest(measured_by, self.fingerprint)
