"""The model that is compressed: its directory or hub id, its config, its checkpoint, and its blocks."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

from dernkit.api import Adapter, Block
from dernkit.errors import CheckpointError
from dernkit.models.architecture import read_config
from dernkit.models.checkpoint import TORCH_DTYPES, Checkpoint, open_checkpoint
from dernkit.models.mtp import Mtp, MtpLayer, find_mtp
from dernkit.models.probe import build_on_meta
from dernkit.models.quantised import DTYPE, Scheme, declarations, scheme_of
from dernkit.models.store import Store, quiet_transformers
from dernkit.sentences import did_you_mean, reason

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
    scheme: Scheme | None = None
    """How the checkpoint is quantised; ``config`` and ``checkpoint`` show it as it is read, in bfloat16."""

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

    @cached_property
    def mtp(self) -> Mtp:
        """The multi-token-prediction layers.

        Raises:
            CheckpointError: there are experts or routers that belong to no layer.
        """
        store, blocks = self.outline
        return find_mtp(store, blocks[-1])

    @cached_property
    def mtp_outline(self) -> list[tuple[Store, Block]]:
        """As `outline`, for every multi-token-prediction layer with routed experts.

        Raises:
            CheckpointError: one does not fit where the last MoE block is.
        """
        try:
            return [self.open_mtp(layer) for layer in self.mtp.layers]
        except CheckpointError as error:
            paths, last = ", ".join(layer.path for layer in self.mtp.layers), self.outline[1][-1].path
            _, _, found = str(error).partition("Got ")
            raise CheckpointError(
                f"{self.path}: multi-token-prediction layers ({paths}) must be built as '{last}' is. "
                f"Got, read in its place, {found}"
            ) from None

    def open_mtp(self, layer: MtpLayer, *, keep_dtypes: bool = False) -> tuple[Store, Block]:
        """A fresh store in which the layer's tensors stand for those of the last MoE block, and that block."""
        swapped = replace(self, checkpoint=self.checkpoint.with_others_in_place(layer.stands_for, layer.names))
        store, blocks = swapped.open(keep_dtypes=keep_dtypes)
        return store, blocks[-1]

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
    source = replace(read_source(path, trust_remote_code=trust_remote_code), adapters=tuple(adapters))
    for block in source.outline[1]:
        _check_routing(path, block)
        block.router_kind()  # runs the router: one that does not do what its shapes say is refused here
    _ = source.mtp_outline  # refuses what it cannot explain
    return source


def read_source(path: Path, *, trust_remote_code: bool = False) -> SourceModel:
    """Config and headers of any checkpoint, without a look at its model: no adapter has claimed it yet.

    Raises:
        CheckpointError: transformers does not know the config, or the checkpoint is damaged or quantised in a way that
            is not read.
    """
    fields = read_config(path)
    _check_model_type(path, fields, trust_remote_code)
    scheme = scheme_of(path, fields)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; each means that the config is not understood
        raise _not_understood(path, error) from None
    _check_rotary(path, config)
    if scheme is not None:
        _as_read(config, fields)
    checkpoint = open_checkpoint(path, scheme.coded if scheme else None)
    model_class = _model_class(config, trust_remote_code)
    return SourceModel(path, config, checkpoint, model_class, (), trust_remote_code, scheme)


def is_read_decoded(path: Path) -> bool:
    """Whether the checkpoint is quantised in a way that is read; false for any other that transformers may load."""
    try:
        return scheme_of(path, read_config(path)) is not None
    except CheckpointError:
        return False


def _as_read(config: Any, fields: Mapping[str, Any]) -> None:
    """The config of the model that is read: without its quantisation, in bfloat16 unless it names a dtype."""
    for (*owners, name), _ in list(declarations(fields)):
        owner = config
        for step in owners:
            owner = getattr(owner, step, None)
        if hasattr(owner, name):
            delattr(owner, name)
    if config.dtype is None:
        config.dtype = DTYPE


def _check_model_type(path: Path, config: Mapping[str, Any], trust_remote_code: bool) -> None:
    """Say what transformers would say in a page, or ask at a prompt."""
    name = config.get("model_type")
    if not isinstance(name, str) or name in CONFIG_MAPPING or (config.get("auto_map") and trust_remote_code):
        return
    if config.get("auto_map"):
        raise CheckpointError(
            f"{path}: must be of a model type that transformers has. Got '{name}', whose code comes with the model, "
            f"instead. Install a plugin that has this architecture, or read that code, then let it run with "
            f"--trust-remote-code."
        )
    raise CheckpointError(
        f"{path / 'config.json'}: must have a 'model_type' that transformers {transformers.__version__} knows. "
        f"Got '{name}' instead. A newer transformers or a plugin may know it. "
        f"{did_you_mean(name, CONFIG_MAPPING.keys())}".rstrip()
    )


def _not_understood(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path / 'config.json'}: must describe a model that transformers {transformers.__version__} can build. "
        f"Got '{reason(error)}' instead."
    )


def _check_rotary(path: Path, config: Any) -> None:
    """DBRX keeps ``rope_theta`` in ``attn_config``, where transformers 5 does not look."""
    written = getattr(getattr(config, "attn_config", None), "rope_theta", None)
    used = (getattr(config, "rope_parameters", None) or {}).get("rope_theta")
    if written is not None and written != used:
        raise CheckpointError(
            f"{path / 'config.json'}: attention must turn as the model was trained, with a rope_theta of {written}. "
            f"Got {used} from transformers {transformers.__version__} instead. "
            f'Write "rope_theta": {written} at its top, too.'
        )


def _check_routing(path: Path, block: Block) -> None:
    if block.dims.top_k > block.dims.experts:
        raise CheckpointError(
            f"{path / 'config.json'}: a token must use at most all {block.dims.experts} experts. "
            f"Got a top-k of {block.dims.top_k} instead. Download it again."
        )


def _model_class(config: Any, trust_remote_code: bool) -> type[nn.Module]:
    names = config.architectures or []
    from_plugin = not type(config).__module__.startswith("transformers.")  # then a name in transformers is another's
    if names and hasattr(transformers, names[0]) and not from_plugin:
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
