"""A whole model in memory: ordinary checkpoints as transformers loads them, and those that only dernkit can load."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, GenerationConfig

from dernkit.api import Adapter
from dernkit.errors import CheckpointError
from dernkit.models.architecture import read_config, use_architecture
from dernkit.models.hub import resolve
from dernkit.models.probe import build_on_meta
from dernkit.models.ragged import read_counts, set_counts
from dernkit.models.source import is_read_decoded, read_source
from dernkit.models.stack import find_blocks
from dernkit.models.store import Store, quiet_transformers
from dernkit.registry import Registry
from dernkit.sentences import reason


def load_model(path: Path | str, *, registry: Registry | None = None, trust_remote_code: bool = False) -> Any:
    """A causal language model on the CPU, in eval mode and its own dtype, from any directory that dernkit has written.

    Results whose layers have different numbers of experts, which transformers cannot load, and all others.

    Args:
        path: the directory, or an id on the Hugging Face hub.
        registry: where adapters and architectures come from; the installed ones by default.
        trust_remote_code: whether code that comes with the model may run.

    Raises:
        CheckpointError: it cannot be loaded without a missing, unexpected or mismatched key.
    """
    registry = registry or Registry.load()
    folder = resolve(str(path))
    use_architecture(folder, registry.components("architecture"))
    adapters = [component.cls() for component in registry.components("adapter")]
    return load_checked(folder, adapters, trust_remote_code=trust_remote_code)


def load_checked(path: Path, adapters: Sequence[Adapter], *, trust_remote_code: bool = False) -> Any:
    """As `load_model`, of a directory whose architecture is known to transformers.

    A quantised checkpoint is loaded as it is compressed: decoded to bfloat16, not run on the kernels of its format.
    """
    with quiet_transformers(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if read_counts(path, read_config(path)) is not None:
                return _uneven(path, adapters, trust_remote_code)
            model, info = _even(path, trust_remote_code)
        except CheckpointError:
            raise
        except Exception as error:  # transformers raises many kinds here; each means that the model does not fit
            raise CheckpointError(
                f"{path}: must hold a causal language model that transformers can load. Got '{reason(error)}' instead."
            ) from None
    problems = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if problems:
        raise CheckpointError(
            f"{path}: must load without a missing, unexpected or mismatched key. Got '{problems[0]}' instead."
        )
    return model.eval()


def _even(path: Path, trust_remote_code: bool) -> tuple[Any, Mapping[str, Any]]:
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


def _uneven(path: Path, adapters: Sequence[Adapter], trust_remote_code: bool) -> Any:
    source = replace(read_source(path, trust_remote_code=trust_remote_code), adapters=tuple(adapters))
    model: Any = build_on_meta(source.model_class, source.config, source.dtype)
    set_counts(path, find_blocks(model, source.adapters), source.counts or ())
    Store(model, source.checkpoint).load_all()
    if model.can_generate() and (path / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()
