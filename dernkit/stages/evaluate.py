"""Evaluate: load a directory in stock transformers and run the recipe's evaluators on it."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from dernkit.api import Adapter, Evaluator, Subject
from dernkit.errors import CheckpointError
from dernkit.kernel import calls
from dernkit.models.device import CPU
from dernkit.models.loading import load_checked
from dernkit.progress import Progress
from dernkit.sentences import reason


def load_tokenizer(path: Path, *, trust_remote_code: bool = False) -> object:
    """The model's own tokenizer.

    Raises:
        CheckpointError: the directory has none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; each means that there is no usable tokenizer
        raise CheckpointError(
            f"{path}: must hold a tokenizer that transformers can load. Got '{reason(error)}' instead. "
            f"Copy the tokenizer's files there."
        ) from None


def load_subject(
    path: Path, adapters: Sequence[Adapter] = (), *, trust_remote_code: bool = False, device: torch.device = CPU
) -> Subject:
    """The whole model in memory, as any user of transformers would load it, in its own dtype.

    A quantised checkpoint is loaded as it is compressed: decoded to bfloat16, not run on the kernels of its format. A
    result whose layers have different numbers of experts is loaded by dernkit, through the ``adapters``.

    Raises:
        CheckpointError: transformers cannot load it, or reports a missing, unexpected or mismatched key.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    model = load_checked(path, adapters, trust_remote_code=trust_remote_code)
    return Subject(model.to(device), tokenizer, path)


def evaluate(
    path: Path,
    evaluators: Sequence[Evaluator],
    progress: Progress,
    *,
    what: str,
    adapters: Sequence[Adapter] = (),
    trust_remote_code: bool = False,
    original: Path | None = None,
    device: torch.device = CPU,
) -> dict[str, Mapping[str, float]]:
    """``position:name`` of each evaluator -> its metrics; ``original``: the model that this one was made from;
    ``device``: where both run."""
    results: dict[str, Mapping[str, float]] = {}
    if not evaluators:
        return results
    how: Any = {"trust_remote_code": trust_remote_code, "device": device}
    subject = load_subject(path, adapters, **how)
    if original is not None:
        load = functools.partial(load_subject, original, adapters, **how)
        subject = replace(subject, original=functools.cache(load))
    with progress.track(f"evaluate {what}", len(evaluators), "evaluators") as tracker:
        for position, evaluator in enumerate(evaluators):
            results[f"{position}:{evaluator.name}"] = _measured(evaluator, subject)
            tracker.advance(1, evaluator.name)
    return results


def _measured(evaluator: Evaluator, subject: Subject) -> Mapping[str, float]:
    try:
        return calls.evaluate(evaluator, subject)
    except OSError as error:
        raise CheckpointError(
            f"{error.filename or subject.path}: must be readable for evaluator '{evaluator.name}'. "
            f"Got '{error.strerror or reason(error)}' instead. Mend that and run the same command again."
        ) from error
