"""The model that is compressed: its directory or hub id, its config, its checkpoint, and its blocks."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from dernkit.api import Adapter, Block
from dernkit.errors import CheckpointError
from dernkit.models.checkpoint import TORCH_DTYPES, Checkpoint, open_checkpoint
from dernkit.models.probe import build_on_meta
from dernkit.models.store import Store, quiet_transformers
from dernkit.sentences import did_you_mean, reason, shown

_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint that dernkit has understood well enough to compress."""

    path: Path
    config: Any
    checkpoint: Checkpoint
    model_class: type[nn.Module]
    adapters: Sequence[Adapter]
    trust_remote_code: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What transformers would compute in: the config's dtype, or else the commonest of the checkpoint."""
        if self.config.dtype is not None:
            return self.config.dtype
        counts = Counter(entry.dtype for entry in self.checkpoint.tensors.values() if "F" in entry.dtype)
        return TORCH_DTYPES[counts.most_common(1)[0][0]]

    @cached_property
    def outline(self) -> tuple[Store, list[Block]]:
        """A store and blocks for sizes and names: nothing is loaded through them. (A checkpoint of 90,000 tensors
        takes seconds to match with its model, so this is done once.)
        """
        return self.open()

    def open(self, *, keep_dtypes: bool = False) -> tuple[Store, list[Block]]:
        """A fresh store over the checkpoint and the blocks of its model.

        Raises:
            CheckpointError: config, checkpoint and adapters do not fit together.
        """
        with quiet_transformers():
            try:
                model: Any = build_on_meta(self.model_class, self.config, self.dtype)
            except Exception as error:  # transformers raises many kinds; each means that the fields do not fit together
                raise _not_understood(self.path, error) from None
            blocks = find_blocks(model, self.adapters)
        model.set_experts_implementation("eager")
        return Store(model, self.checkpoint, keep_dtypes=keep_dtypes), blocks

    def fingerprint(self) -> str:
        """Digest of config, tensor layout and evenly spaced samples of the weights (all bytes would take minutes)."""
        digest = hashlib.sha256((self.path / "config.json").read_bytes())
        for shard in self.checkpoint.shards:
            size = (self.path / shard).stat().st_size
            digest.update(f"{shard} {size}".encode())
            with (self.path / shard).open("rb") as stream:
                for at in range(0, size, max(size // 256, 4096)):
                    digest.update(os.pread(stream.fileno(), 4096, at))
        return digest.hexdigest()


def resolve(model: str) -> Path:
    """A local directory as it is; anything else is a hub id that huggingface_hub downloads (or finds in its cache)."""
    path = Path(model)
    if path.is_dir():
        return path
    if path.exists() or model.startswith((".", "/", "~")):
        raise CheckpointError(f"--model: must be a directory or a hub id. Got '{model}', which is neither, instead.")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "LICENSE*", "NOTICE*", "README.md"]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise CheckpointError(
            f"--model: must be a directory or a hub id that can be reached. Got '{model}' instead ({reason(error)})"
        ) from None


def open_source(path: Path, adapters: Sequence[Adapter], *, trust_remote_code: bool = False) -> SourceModel:
    """Read config and headers, build on the meta device, and check that all of it is understood.

    Raises:
        CheckpointError: not a MoE, quantised, damaged, or of a layout that no adapter explains.
    """
    source = read_source(path, adapters, trust_remote_code=trust_remote_code)
    for block in source.outline[1]:
        _check_routing(path, block)
    return source


def read_source(path: Path, adapters: Sequence[Adapter], *, trust_remote_code: bool = False) -> SourceModel:
    """Read config and headers, whatever the adapters may say about the model.

    Raises:
        CheckpointError: quantised or damaged.
    """
    if not (path / "config.json").is_file():
        raise CheckpointError(f"{path}: must hold config.json. Got none instead. Give the directory of a checkpoint.")
    _check_model_type(path, trust_remote_code)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; each means that the config is not understood
        raise _not_understood(path, error) from None
    _refuse_quantised(path, config)
    return SourceModel(
        path, config, open_checkpoint(path), _model_class(config, trust_remote_code), tuple(adapters), trust_remote_code
    )


def _check_model_type(path: Path, trust_remote_code: bool) -> None:
    """Say what transformers would say in a page, or ask at a prompt."""
    file = path / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: must be JSON. Got '{reason(error)}' instead. Download it again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file}: must be a JSON object. Got {shown(config)} instead. Download it again.")
    name = config.get("model_type")
    if not isinstance(name, str) or name in CONFIG_MAPPING or (config.get("auto_map") and trust_remote_code):
        return
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path}: must be of a model type that transformers has. Got '{name}', whose code comes with the model, "
            f"instead. Read that code, then let it run with --trust-remote-code."
        )
    raise CheckpointError(
        f"{file}: must have a 'model_type' that transformers {transformers.__version__} knows. Got '{name}' instead. "
        f"{did_you_mean(name, CONFIG_MAPPING.keys()) or 'A newer transformers may know it.'}"
    )


def _not_understood(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path / 'config.json'}: must describe a model that transformers {transformers.__version__} can build. "
        f"Got '{reason(error)}' instead."
    )


def _check_routing(path: Path, block: Block) -> None:
    if block.dims.top_k > block.dims.experts:
        raise CheckpointError(
            f"{path / 'config.json'}: a token must use at most all {block.dims.experts} experts. "
            f"Got a top-k of {block.dims.top_k} instead. Download it again."
        )


def _refuse_quantised(path: Path, config: Any) -> None:
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None:
        method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else str(quantised)
        raise CheckpointError(
            f"{path}: weights must be plain float32, bfloat16 or float16. Got '{method}' quantisation instead. "
            f"Dequantise to bf16 first."
        )


def _model_class(config: Any, trust_remote_code: bool) -> type[nn.Module]:
    names = config.architectures or []
    if names and hasattr(transformers, names[0]):
        return getattr(transformers, names[0])
    if type(config) in AutoModelForCausalLM._model_mapping:
        return AutoModelForCausalLM._model_mapping[type(config)]
    if trust_remote_code and names and "AutoModelForCausalLM" in getattr(config, "auto_map", {}):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        try:
            return get_class_from_dynamic_module(config.auto_map["AutoModelForCausalLM"], config._name_or_path)
        except Exception as error:  # code of strangers
            raise CheckpointError(
                f"{config._name_or_path}: the code that comes with the model must run. Got '{reason(error)}' instead."
            ) from error
    raise CheckpointError(
        f"config.json: 'architectures' must name a model class of transformers. Got {names or 'none'} instead. "
        f"A model with its own code needs --trust-remote-code."
    )


def find_blocks(model: Any, adapters: Sequence[Adapter]) -> list[Block]:
    """The MoE blocks that exactly one adapter claims.

    Raises:
        CheckpointError: no adapter does (not a MoE, or an undeclared one), or several do.
    """
    claims = {adapter.name: blocks for adapter in adapters if (blocks := adapter.blocks(model))}
    if len(claims) == 1:
        return next(iter(claims.values()))
    if claims:
        raise CheckpointError(
            f"{model.config.model_type}: one adapter must claim the model. Got {', '.join(sorted(claims))} instead. "
            f"Uninstall one of the plugins."
        )
    if _counts_experts(model.config.to_dict()):
        raise CheckpointError(
            f"{model.config.model_type}: experts must be declared by transformers' experts interface. "
            f"Got a class that does not declare them instead. This family needs an adapter plugin."
        )
    raise CheckpointError(
        f"{model.config.model_type}: must be a Mixture-of-Experts model. Got a model without routed experts instead."
    )


def _counts_experts(config: Mapping[str, Any]) -> bool:
    """Whether a field that is known to count experts, nested ones included, says more than one."""
    return any(
        _counts_experts(value) if isinstance(value, dict) else name in _COUNT_NAMES and type(value) is int and value > 1
        for name, value in config.items()
    )


@dataclass(frozen=True, slots=True)
class Stack:
    """The decoder stack that holds the MoE blocks."""

    owner: Any
    """The module that owns the stack: embeddings, masks and rotary tables are its own."""
    owner_path: str
    layers: list[nn.Module]
    paths: list[str]


def decoder_stack(model: Any, blocks: Sequence[Block]) -> Stack:
    """The module list in which all blocks lie."""
    prefixes = {block.path[: f"{block.path}.".index(f".{block.layer}.")] for block in blocks}
    if len(prefixes) != 1:
        raise CheckpointError(
            f"{model.config.model_type}: all MoE blocks must lie in one decoder stack. "
            f"Got {', '.join(sorted(prefixes))} instead. This family needs an adapter plugin."
        )
    path = prefixes.pop()
    layers = list(model.get_submodule(path).children())
    owner_path = path.rpartition(".")[0]
    return Stack(model.get_submodule(owner_path), owner_path, layers, [f"{path}.{i}" for i in range(len(layers))])
