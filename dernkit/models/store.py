"""A model on the meta device over a checkpoint on disk: load the parameters below one prefix, use them, drop them."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import LoadStateDictConfig

from dernkit.errors import CheckpointError
from dernkit.models.checkpoint import Checkpoint
from dernkit.models.device import CPU
from dernkit.models.headers import TORCH_DTYPES
from dernkit.models.orientation import refuse_square, settled


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """No progress bars or warnings of transformers' own loader inside (a bar per layer would drown ours)."""
    bars, level = transformers.logging.is_progress_bar_enabled(), transformers.logging.get_verbosity()
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


class Store:
    """The loader. Parameters of ``model`` are on the meta device except those that `load` made real.

    Args:
        model: built on the meta device with real buffers, parameters in the dtype to compute in.
        checkpoint: where its tensors lie.
        keep_dtypes: load every tensor in its dtype on disk (for surgery) instead of the model's (for forward passes).
        device: where the model's buffers go, and all that is loaded.
    """

    def __init__(
        self, model: Any, checkpoint: Checkpoint, *, keep_dtypes: bool = False, device: torch.device = CPU
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self.device = device
        self.target_of = _namer(model)
        targets = {key: self.target_of(key) for key in checkpoint.tensors}
        self.target = {key: target for key, target in targets.items() if target is not None}
        self.ignored = [key for key, target in targets.items() if target is None]
        self._refuse_disagreement()
        self._dtype_plan = {} if keep_dtypes else model._get_dtype_plan(model.dtype)
        if keep_dtypes:
            self._adopt_dtypes()
        if device != CPU:
            self._move_buffers()
        self._conversions, self._turned = settled(model._weight_conversions, self._shapes())

    def keys(self, names: Iterable[str]) -> list[str]:
        """Names on disk that feed the in-memory tensors ``names`` (all experts of a fused tensor)."""
        wanted = set(names)
        return [key for key, target in self.target.items() if target in wanted]

    def keys_below(self, prefix: str) -> list[str]:
        """Names on disk that feed tensors below the module ``prefix``."""
        return [key for key, target in self.target.items() if not prefix or target.startswith(prefix + ".")]

    def load(self, prefix: str) -> nn.Module:
        """Make all parameters below the module ``prefix`` real.

        Raises:
            CheckpointError: a tensor does not fit, is missing, or holds NaN or infinity.
        """
        self._load(self.keys_below(prefix), prefix)
        module = self.model.get_submodule(prefix)
        left = [name for name, parameter in module.named_parameters() if parameter.is_meta]
        if left:
            raise CheckpointError(
                f"{self.checkpoint.path}: must hold '{prefix}.{left[0]}'. Got no such tensor. Download it again."
            )
        return module

    def load_all(self) -> None:
        """Make all parameters of the model real, and tie those that the checkpoint holds once.

        Raises:
            CheckpointError: a tensor does not fit, is missing, or holds NaN or infinity.
        """
        self._load(list(self.target), "the model")
        self.model.tie_weights(missing_keys={name for name, tensor in self._parameters() if tensor.is_meta})
        left = [name for name, tensor in self._parameters() if tensor.is_meta]
        if left:
            raise CheckpointError(
                f"{self.checkpoint.path}: must hold '{left[0]}'. Got no such tensor. Download it again."
            )

    def _parameters(self) -> list[tuple[str, Tensor]]:
        return list(self.model.named_parameters(remove_duplicate=False))

    def load_around(self, owner: str, layers: Sequence[str]) -> None:
        """Make real what lies below ``owner`` but in none of its ``layers`` (embeddings, norms; never the head)."""
        inside = tuple(layer + "." for layer in layers)
        keys = [key for key in self.keys_below(owner) if not self.target[key].startswith(inside)]
        self._load(keys, "the parts outside the decoder layers")

    def load_outside(self, layers: Sequence[str]) -> None:
        """Make real all but the ``layers``, the head included, and tie what the checkpoint holds once."""
        self.load_around("", layers)
        inside = tuple(layer + "." for layer in layers)
        left = {name for name, tensor in self._parameters() if tensor.is_meta and not name.startswith(inside)}
        self.model.tie_weights(missing_keys=left)

    def unload(self, prefix: str) -> None:
        """Put the parameters below the module ``prefix`` back on the meta device."""
        for module in self.model.get_submodule(prefix).modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(
                        torch.empty_like(parameter, device="meta"), requires_grad=False
                    )
        if self.checkpoint.coded:
            _give_back()

    def to_disk(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """In-memory tensors (on the meta device too) under the names and in the layout that the source has."""
        self.model._weight_conversions = self._conversions
        with quiet_transformers():
            disk = revert_weight_conversion(self.model, dict(tensors))
        refuse_square(self._turned, disk)
        return self._with_source_prefix(disk)

    def _shapes(self) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
        """Name on disk -> its shape there and that of the in-memory tensor that it feeds."""
        memory = self.model.state_dict()
        return {
            key: (self.checkpoint.tensors[key].shape, tuple(memory[name].shape)) for key, name in self.target.items()
        }

    def _with_source_prefix(self, disk: dict[str, Tensor]) -> dict[str, Tensor]:
        """A checkpoint of the base model lacks the base prefix (or has one too many): follow the source's spelling."""
        known = self.checkpoint.tensors
        prefix = self.model.base_model_prefix + "."
        names = {}
        for name, tensor in disk.items():
            spellings = (name, prefix + name, name.removeprefix(prefix))
            names[next((spelling for spelling in spellings if spelling in known), name)] = tensor
        return names

    def _load(self, keys: list[str], what: str) -> None:
        load_config = _load_config(self.model, str(self.device), self._dtype_plan)
        with self.checkpoint.slices(keys) as slices, quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(self.model, slices, load_config)
        problems = [*info.mismatched_keys, *info.unexpected_keys, *info.conversion_errors.values()]
        if problems:
            raise CheckpointError(
                f"{self.checkpoint.path}: {what} must fit config.json. Got {str(problems[0])[:300]} instead."
            )
        self._refuse_non_finite({self.target[key] for key in keys})

    def _refuse_non_finite(self, names: set[str]) -> None:
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        for name in sorted(names & tensors.keys()):
            tensor = tensors[name]
            if tensor.is_floating_point() and not tensor.is_meta and not _finite(tensor):
                self.refuse_non_finite_on_disk(self.keys([name]))
                key = self.checkpoint.stored(self.keys([name])[0])
                raise CheckpointError(
                    f"{self.checkpoint.path}: weights must be finite in {tensor.dtype}, to which config.json has them "
                    f"converted. Got larger numbers in '{key}' instead. Correct 'dtype' there."
                )

    def refuse_non_finite_on_disk(self, keys: Iterable[str]) -> None:
        """Read the parameters among the tensors ``keys`` once, to check them.

        Raises:
            CheckpointError: one of them holds NaN or infinity.
        """
        parameters = {name for name, _ in self.model.named_parameters()}
        self.refuse_non_finite_tensors(key for key in keys if self.target.get(key) in parameters)

    def refuse_non_finite_tensors(self, keys: Iterable[str]) -> None:
        """Read the tensors ``keys`` once, parameters of the model or not, to check them.

        Raises:
            CheckpointError: one of them holds NaN or infinity.
        """
        for key in keys:
            if not _finite(self.checkpoint.read(key)):
                raise CheckpointError(
                    f"{self.checkpoint.path}: weights must be finite. Got NaN or infinity in "
                    f"'{self.checkpoint.stored(key)}' instead. Download {self.checkpoint.tensors[key].shard} again."
                )

    def _refuse_disagreement(self) -> None:
        """Config and checkpoint must agree on every name and shape; checked on the meta device, no byte is read."""
        checkpoint, model = self.checkpoint, self.model
        empty = {
            name: torch.empty(entry.shape, dtype=TORCH_DTYPES[entry.dtype], device="meta")
            for name, entry in checkpoint.tensors.items()
            if name in self.target
        }
        buffers = {name: buffer for name, buffer in model.named_buffers()}
        with quiet_transformers():
            info, _ = convert_and_load_state_dict_in_model(model, empty, _load_config(model, "meta", {}))
        for name, buffer in buffers.items():
            parent, _, leaf = name.rpartition(".")
            model.get_submodule(parent)._buffers[leaf] = buffer
        self._report(info)

    def _report(self, info: Any) -> None:
        where = f"{self.checkpoint.path}: the checkpoint must fit config.json."
        for name, found, expected in sorted(info.mismatched_keys):
            raise CheckpointError(
                f"{where} Got shape {list(found)} for '{name}', not {list(expected)}, instead. "
                f"Take both from the same download."
            )
        for name in info.conversion_errors:
            lacking = _missing_expert(self.keys([name]))
            what = f"no tensor '{lacking}'" if lacking else f"tensors that do not fit together for '{name}'"
            raise CheckpointError(f"{where} Got {what} instead. Download the checkpoint again.")
        tied = set(getattr(self.model, "all_tied_weights_keys", {}) or {})
        missing = sorted(info.missing_keys - tied)
        if missing:
            raise CheckpointError(f"{where} Got no tensor for '{missing[0]}' instead. Download the checkpoint again.")

    def _move_buffers(self) -> None:
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[name] = buffer.to(self.device)

    def _adopt_dtypes(self) -> None:
        for key, target in self.target.items():
            dtype = TORCH_DTYPES[self.checkpoint.tensors[key].dtype]
            parent, _, leaf = target.rpartition(".")
            module = self.model.get_submodule(parent)
            if leaf in module._buffers:
                module._buffers[leaf] = module.get_buffer(leaf).to(dtype)
            else:
                module._parameters[leaf] = nn.Parameter(module.get_parameter(leaf).to(dtype), requires_grad=False)


def _give_back() -> None:
    """Have the C library return freed memory, where it can be asked to.

    The loader decodes in threads that it makes anew for each layer, and the heap of each of them keeps what it has had.
    """
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _missing_expert(keys: Iterable[str]) -> str | None:
    """The first tensor that some experts have among ``keys`` and one expert lacks."""
    parts = [match.groups() for key in keys if (match := re.fullmatch(r"(.*\.)(\d+)(\..*)", key))]
    numbers = range(max((int(number) for _, number, _ in parts), default=-1) + 1)
    for prefix, suffix in sorted({(prefix, suffix) for prefix, _, suffix in parts}):
        for number in numbers:
            if (prefix, str(number), suffix) not in parts:
                return f"{prefix}{number}{suffix}"
    return None


def _load_config(model: Any, device: str, dtype_plan: dict[str, torch.dtype]) -> LoadStateDictConfig:
    return LoadStateDictConfig(
        weight_mapping=get_model_conversion_mapping(model),
        device_map={"": device},
        dtype=model.dtype,
        dtype_plan=dtype_plan,
    )


def _namer(model: Any) -> Callable[[str], str | None]:
    """Name on disk -> the in-memory tensor that it feeds, None for one that transformers ignores."""
    mapping = get_model_conversion_mapping(model)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    meta = model.state_dict()

    def name_of(key: str) -> str | None:
        name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, meta)
        if name not in meta:
            name, _ = rename_source_key(key, [], [], model.base_model_prefix, meta)
        return name if name in meta else None

    return name_of
