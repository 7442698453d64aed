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
from torch import nn
from transformers import AutoConfig

from dernkit.api import Adapter, Block
from dernkit.errors import CheckpointError
from dernkit.models.architecture import read_config
from dernkit.models.checkpoint import Checkpoint, open_checkpoint
from dernkit.models.config_class import check_model_type, check_rotary, model_class, not_understood
from dernkit.models.device import CPU
from dernkit.models.headers import TORCH_DTYPES
from dernkit.models.mtp import Mtp, MtpLayer, find_mtp
from dernkit.models.probe import build_on_meta
from dernkit.models.quantised import DTYPE, Scheme, declarations, scheme_of
from dernkit.models.ragged import read_counts, set_counts
from dernkit.models.stack import find_blocks
from dernkit.models.store import Store, quiet_transformers


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
    counts: tuple[int, ...] | None = None
    """Experts in every MoE layer, where they differ: a result of dernkit's that only dernkit loads."""
    device: torch.device = CPU
    """Where its weights are loaded to."""

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
                raise not_understood(self.path, error) from None
            blocks = find_blocks(model, self.adapters)
        if self.counts is not None:
            set_counts(self.path, blocks, self.counts)
        model.set_experts_implementation("eager")
        return Store(model, self.checkpoint, keep_dtypes=keep_dtypes, device=self.device), blocks

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


def open_source(
    path: Path, adapters: Sequence[Adapter], *, trust_remote_code: bool = False, device: torch.device = CPU
) -> SourceModel:
    """Read config and headers, build on the meta device, and check that all of it is understood.

    Args:
        path: the model's directory.
        adapters: of all kinds of blocks.
        trust_remote_code: whether code that comes with the model may run.
        device: where weights are loaded to.

    Raises:
        CheckpointError: not a MoE, quantised, damaged, or of a layout that no adapter explains.
    """
    source = read_source(path, trust_remote_code=trust_remote_code)
    source = replace(source, adapters=tuple(adapters), device=device)
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
    check_model_type(path, fields, trust_remote_code)
    scheme = scheme_of(path, fields)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here; each means that the config is not understood
        raise not_understood(path, error) from None
    check_rotary(path, config)
    if scheme is not None:
        _as_read(config, fields)
    checkpoint = open_checkpoint(path, scheme.coded if scheme else None)
    cls, counts = model_class(config, trust_remote_code), read_counts(path, fields)
    return SourceModel(path, config, checkpoint, cls, (), trust_remote_code, scheme, counts)


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


def _check_routing(path: Path, block: Block) -> None:
    if block.dims.top_k > block.dims.experts:
        raise CheckpointError(
            f"{path / 'config.json'}: a token must use at most all {block.dims.experts} experts. "
            f"Got a top-k of {block.dims.top_k} instead. Download it again."
        )
