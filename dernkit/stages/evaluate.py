"""Evaluate: load a directory in stock transformers and run the recipe's evaluators on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer

from dernkit.api import Evaluator, Subject
from dernkit.errors import CheckpointError
from dernkit.kernel import calls
from dernkit.models.source import is_read_decoded, read_source
from dernkit.models.store import quiet_transformers
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


def load_subject(path: Path, *, trust_remote_code: bool = False) -> Subject:
    """The whole model in memory, as any user of transformers would load it, in its own dtype.

    A quantised checkpoint is loaded as it is compressed: decoded to bfloat16, not run on the kernels of its format.

    Raises:
        CheckpointError: transformers cannot load it, or reports a missing, unexpected or mismatched key.
    """
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model, info = _load_model(path, trust_remote_code)
        except CheckpointError:
            raise
        except Exception as error:  # as above
            raise CheckpointError(
                f"{path}: must hold a causal language model that transformers can load. Got '{reason(error)}' instead."
            ) from None
    problems = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if problems:
        raise CheckpointError(
            f"{path}: must load without a missing, unexpected or mismatched key. Got '{problems[0]}' instead."
        )
    return Subject(model.eval(), tokenizer, path)


def _load_model(path: Path, trust_remote_code: bool) -> tuple[Any, Mapping[str, Any]]:
    if not is_read_decoded(path):
        return AutoModelForCausalLM.from_pretrained(
            path,
            dtype="auto",
            trust_remote_code=trust_remote_code,
            local_files_only=True,
            output_loading_info=True,
        )
    source: Any = read_source(path, trust_remote_code=trust_remote_code)
    with source.checkpoint.slices(list(source.checkpoint.tensors)) as slices:
        return source.model_class.from_pretrained(
            None, config=source.config, state_dict=slices, dtype=source.dtype, output_loading_info=True
        )


def evaluate(
    path: Path, evaluators: Sequence[Evaluator], progress: Progress, *, what: str, trust_remote_code: bool = False
) -> dict[str, Mapping[str, float]]:
    """``position:name`` of each evaluator -> its metrics."""
    results: dict[str, Mapping[str, float]] = {}
    if not evaluators:
        return results
    subject = load_subject(path, trust_remote_code=trust_remote_code)
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
