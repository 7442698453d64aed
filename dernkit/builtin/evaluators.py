"""Measurements of a model: perplexity on text files, and lm-eval's tasks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, final

import torch
from annotated_types import Interval
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy

from dernkit.api import CheckpointError, RecipeError, Subject, hookimpl


@final
@dataclass(frozen=True)
class Perplexity:
    """Loss per token, perplexity and bits per byte on a text file, or on every ``*.txt`` of a folder (one a domain)."""

    name: ClassVar[str] = "perplexity"

    path: Path
    """A UTF-8 text file, or a folder of them; the file's stem is the domain's name."""
    length: Annotated[int, Interval(ge=2, le=1_048_576)] = 1024
    """Tokens in a window."""
    stride: Annotated[int, Interval(ge=1, le=1_048_576)] | None = None
    """Tokens between the starts of two windows; the overlap is context and is not scored.

    By default ``length - 1``: every token is scored once.
    """
    batch_size: Annotated[int, Interval(ge=1, le=4096)] = 8
    """Windows in one forward pass."""
    limit: Annotated[int, Interval(ge=2, le=1_000_000_000)] | None = None
    """Read only so many bytes of each text."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        """Per domain: ``loss`` (nats per scored token), ``perplexity``, ``bits_per_byte``, ``tokens``; and means."""
        results: dict[str, float] = {}
        losses = []
        for file in self._files():
            text = _read(file, self.limit)
            loss, tokens = self._loss(subject, text, file)
            losses.append(loss)
            results |= {
                f"{file.stem}/loss": loss,
                f"{file.stem}/perplexity": _exp(loss),
                f"{file.stem}/bits_per_byte": loss * tokens / math.log(2) / len(text.encode()),
                f"{file.stem}/tokens": tokens,
            }
        mean = sum(losses) / len(losses)
        return results | {"mean/loss": mean, "mean/perplexity": _exp(mean)}

    def _files(self) -> list[Path]:
        files = sorted(self.path.glob("*.txt")) if self.path.is_dir() else [self.path]
        if not files or not files[0].is_file():
            raise RecipeError(
                f"perplexity.path: must be a text file or a folder of *.txt. Got '{self.path}' instead. "
                f"Point it at held-out text with --set evaluate.0.path=FILE."
            )
        return files

    def _loss(self, subject: Subject, text: str, file: Path) -> tuple[float, int]:
        ids = torch.tensor(subject.tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)
        if len(ids) < 2:
            raise RecipeError(
                f"perplexity.path: texts must have at least 2 tokens. Got {len(ids)} in '{file}' instead."
            )
        rows = subject.model.get_input_embeddings().num_embeddings
        if int(ids.max()) >= rows:
            raise CheckpointError(
                f"{subject.path}: the tokenizer must give tokens below {rows}, the model's vocabulary. "
                f"Got {int(ids.max())} instead. Take model and tokenizer from the same download."
            )
        total, count = 0.0, 0
        for inputs, labels in self._batches(ids):
            with torch.no_grad():
                logits = subject.model(input_ids=inputs, use_cache=False).logits
            # Not the model's own loss: some families add their load-balancing loss to it.
            total += sum(map(_nats, logits, labels))
            count += int((labels[:, 1:] != -100).sum())
        return total / count, count

    def _batches(self, ids: Int64[Tensor, " tokens"]) -> Iterator[tuple[Tensor, Tensor]]:
        """Windows and labels (-100 = context only); windows of equal length share a batch."""
        stride = min(self.stride or self.length - 1, self.length - 1)
        windows: list[tuple[Tensor, Tensor]] = []
        scored = 1  # the first token has nothing before it
        for start in range(0, len(ids), stride):
            window = ids[start : start + self.length]
            labels = window.clone()
            labels[: scored - start] = -100
            end = start + len(window)
            if end > scored:
                windows.append((window, labels))
                scored = end
            if end == len(ids):
                break
        for at in range(0, len(windows), self.batch_size):
            chunk = windows[at : at + self.batch_size]
            for size in sorted({len(window) for window, _ in chunk}, reverse=True):
                same = [pair for pair in chunk if len(pair[0]) == size]
                yield torch.stack([window for window, _ in same]), torch.stack([labels for _, labels in same])


def _nats(logits: Float[Tensor, "tokens vocabulary"], labels: Int64[Tensor, " tokens"]) -> float:
    """Summed loss of one window."""
    losses = cross_entropy(logits[:-1].float(), labels[1:], ignore_index=-100, reduction="none")
    return float(losses.double().sum())


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _read(file: Path, limit: int | None) -> str:
    try:
        text = file.read_text(encoding="utf-8")
        return text if limit is None else text.encode()[:limit].decode(errors="ignore")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(
            f"perplexity.path: must be UTF-8 text that can be read. Got '{file}' ({error}) instead."
        ) from None


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
    """The evaluators that come with dernkit."""
    return [Perplexity, LmEval]
