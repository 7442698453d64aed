"""Tasks of lm-evaluation-harness, as an evaluator."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from pathlib import Path
from typing import Annotated, Any, ClassVar, final

import numpy as np
from annotated_types import Interval

from dernkit.api import Observations, RecipeError, Subject, hookimpl


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
        results = self._run(subject, self.bootstrap)
        metrics: dict[str, float] = {}
        for task, values in sorted(results["results"].items()):
            for key, value in values.items():
                if isinstance(value, int | float) and not isinstance(value, bool):
                    metrics[f"{task}/{_short(key)}"] = float(value)
            if task in results["n-samples"]:
                metrics[f"{task}/samples"] = float(results["n-samples"][task]["effective"])
        return metrics

    def observe(self, subject: Subject) -> Mapping[str, Observations]:
        """Metrics of documents (named ``task:number``), in groups by task; those that are no mean are left out.

        ``acc``, ``acc_norm`` and the like as they are, with weight 1. For perplexity, where the mean of the tasks
        would say little, ``nats`` of each document; for perplexity of whole texts ``bits_per_byte`` and
        ``nats_per_word``, weighed by bytes and words.
        """
        results = self._run(subject, bootstrap=0, log_samples=True)
        found: dict[str, list[_Measured]] = {}
        for task, samples in sorted(results["samples"].items()):
            for measured in _measured(task, samples, results):
                found.setdefault(measured.metric, []).append(measured)
        return {metric: _joined(parts) for metric, parts in sorted(found.items())}

    def _run(self, subject: Subject, bootstrap: int, *, log_samples: bool = False) -> Mapping[str, Any]:
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
                bootstrap_iters=bootstrap,
                task_manager=manager,
                log_samples=log_samples,
            )
        except Exception as error:  # data that cannot be downloaded or read, templates that do not fit it
            reason = " ".join(f"{type(error).__name__}: {error}".split()).rstrip(".")
            raise RecipeError(f"lm-eval.tasks: must run to their end. Got '{reason}' instead.") from error


@dataclass(frozen=True, slots=True)
class _Measured:
    """One metric on the documents of one task."""

    metric: str
    task: str
    documents: Sequence[str]
    values: np.ndarray
    weights: np.ndarray
    higher_is_better: bool


def _measured(task: str, samples: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Iterator[_Measured]:
    """The metrics of a task that are a mean of its documents."""
    kinds = sorted({(metric, sample["filter"]) for sample in samples for metric in sample["metrics"]})
    for metric, chosen in kinds:
        better = results["higher_is_better"][task].get(metric)
        of_kind = [sample for sample in samples if sample["filter"] == chosen and metric in sample["metrics"]]
        seen = _numbers(metric, [sample[metric] for sample in of_kind], results["results"][task][f"{metric},{chosen}"])
        if better is not None and seen is not None:
            name, values, weights = seen
            documents = [f"{task}:{sample['doc_id']}" for sample in of_kind]
            order = np.argsort([int(sample["doc_id"]) for sample in of_kind], kind="stable")
            named = [documents[place] for place in order]
            yield _Measured(
                _short(f"{name},{chosen}"), task, named, values[order], weights[order], better and name == metric
            )


def _numbers(metric: str, values: Sequence[Any], overall: Any) -> tuple[str, np.ndarray, np.ndarray] | None:
    """The metric's name, values and weights; None where lm-eval makes something else than a mean of them."""
    if metric in _OF_TEXTS:  # (log-likelihood, how many bytes or words)
        name, unit = _OF_TEXTS[metric]
        pairs = np.array(values, dtype=np.float64)
        return name, -pairs[:, 0] / unit, pairs[:, 1]
    if not all(isinstance(value, Real) for value in values):
        return None
    plain = np.array(values, dtype=np.float64)
    if metric == "perplexity":  # log-likelihood
        return "nats", -plain, np.ones(len(plain))
    if not math.isclose(plain.mean(), overall, rel_tol=1e-9, abs_tol=1e-12):
        return None
    return metric, plain, np.ones(len(plain))


_OF_TEXTS = {"bits_per_byte": ("bits_per_byte", math.log(2)), "word_perplexity": ("nats_per_word", 1.0)}


def _joined(parts: Sequence[_Measured]) -> Observations:
    """One metric on the documents of all tasks that have it."""
    return Observations(
        documents=tuple(name for part in parts for name in part.documents),
        groups=tuple(part.task for part in parts for _ in part.documents),
        values=np.concatenate([part.values for part in parts]),
        weights=np.concatenate([part.weights for part in parts]),
        higher_is_better=all(part.higher_is_better for part in parts),
    )


def _short(key: str) -> str:
    """``acc`` for ``acc,none``: lm-eval's name of a metric, without a filter that is none."""
    metric, _, chosen = key.partition(",")
    return metric if chosen in ("", "none") else key


@hookimpl
def dernkit_evaluators() -> list[type]:
    """The evaluator that runs lm-eval's tasks."""
    return [LmEval]
