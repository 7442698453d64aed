"""Tasks of lm-evaluation-harness, as an evaluator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, final

from annotated_types import Interval

from dernkit.api import RecipeError, Subject, hookimpl


@final
@dataclass(frozen=True)
class LmEval:
    """Tasks of lm-evaluation-harness, run by its own ``simple_evaluate`` on the loaded model."""

    name: ClassVar[str] = "lm-eval"

    tasks: tuple[str, ...]
    """Task or group names."""
    include_path: Path | None = None
    """Folder of task YAMLs: with local data, no network is needed."""
    limit: Annotated[int, Interval(ge=1, le=10_000_000)] | None = None
    """Documents per task."""
    num_fewshot: Annotated[int, Interval(ge=0, le=1000)] | None = None
    """Examples in the prompt; the task's own number by default."""
    batch_size: Annotated[int, Interval(ge=1, le=4096)] = 8
    """Requests in one forward pass."""
    bootstrap: Annotated[int, Interval(ge=0, le=100_000)] = 1000
    """Bootstrap resamples for standard errors; 0 leaves them out."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        """``task/metric`` -> value, standard errors as ``task/metric_stderr``, documents as ``task/samples``."""
        results = self._run(subject)
        metrics: dict[str, float] = {}
        for task, values in sorted(results["results"].items()):
            for key, value in values.items():
                metric, _, filtered = key.partition(",")
                if isinstance(value, int | float) and not isinstance(value, bool):
                    suffix = "" if filtered in ("", "none") else f",{filtered}"
                    metrics[f"{task}/{metric}{suffix}"] = float(value)
            if task in results["n-samples"]:
                metrics[f"{task}/samples"] = float(results["n-samples"][task]["effective"])
        return metrics

    def _run(self, subject: Subject) -> Mapping[str, Any]:
        try:
            import lm_eval
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager
        except ImportError:
            raise RecipeError(
                "evaluate: 'lm-eval' needs the package of that name. Got none instead. "
                "Install it with: pip install 'dernkit[eval]'"
            ) from None
        if self.include_path is not None and not self.include_path.is_dir():
            raise RecipeError(f"lm-eval.include_path: must be a folder of YAMLs. Got '{self.include_path}' instead.")
        manager = TaskManager(include_path=None if self.include_path is None else str(self.include_path))
        missing = [task for task in self.tasks if not manager.match_tasks([task])]
        if missing:
            raise RecipeError(
                f"lm-eval.tasks: must be tasks that lm-eval knows. Got '{missing[0]}' instead. "
                f"List them with: lm_eval ls tasks"
            )
        try:
            return lm_eval.simple_evaluate(
                model=HFLM(pretrained=subject.model, tokenizer=subject.tokenizer, batch_size=self.batch_size),
                tasks=list(self.tasks),
                num_fewshot=self.num_fewshot,
                limit=self.limit,
                bootstrap_iters=self.bootstrap,
                task_manager=manager,
                log_samples=False,
            )
        except Exception as error:  # data that cannot be downloaded or read, templates that do not fit it
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            raise RecipeError(f"lm-eval.tasks: must run to their end. Got '{reason}' instead.") from error


@hookimpl
def dernkit_evaluators() -> list[type]:
    """The evaluator that runs lm-eval's tasks."""
    return [LmEval]
