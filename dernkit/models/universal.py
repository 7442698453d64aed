"""The adapter for every family whose experts class transformers declares (``@use_experts_implementation``).

Two meta builds say what follows the expert count (see `dernkit.models.probe`). What neither they nor the declaration
explains is refused, never guessed.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import nn

from dernkit.api import Block, hookimpl
from dernkit.errors import CheckpointError
from dernkit.models.block import Family, UniversalBlock, experts_grown, is_declared_experts, tensor_of
from dernkit.models.groups import group_rules
from dernkit.models.probe import Probe, probe_field
from dernkit.types import LayerDims


@final
@dataclass(frozen=True)
class Universal:
    """All MoE families whose experts transformers declares."""

    name: ClassVar[str] = "universal"

    def blocks(self, model: Any) -> list[Block]:
        """All MoE blocks in layer order; empty when transformers declares no experts in the model."""
        paths = [path for path, module in model.named_modules() if is_declared_experts(module)]
        if not paths:
            return []
        counts = {model.get_submodule(path).down_proj.shape[0] for path in paths}
        widths = {_width(model.get_submodule(path)) for path in paths}
        if len(counts) != 1 or len(widths) != 1:
            raise CheckpointError(
                f"{model.config.model_type}: all MoE layers must have one expert count and one width. "
                f"Got counts {sorted(counts)} and widths {sorted(widths)} instead."
            )
        count = probe_field(model, counts.pop(), experts_grown, "expert count")
        family = Family(model, count, model.get_submodule(paths[0]).down_proj.shape[0], widths.pop())
        blocks = [_block(model, path, family) for path in paths]
        _refuse_unexplained(model, blocks, count)
        return list(blocks)


def _width(experts: Any) -> int:
    return int(experts.down_proj.shape[1 if experts.is_transposed else 2])


def _block(model: Any, experts_path: str, family: Family) -> UniversalBlock:
    path = experts_path.rpartition(".")[0]
    module, experts = model.get_submodule(path), model.get_submodule(experts_path)
    followers = {
        name.removeprefix(path + "."): dims
        for name, dims in family.count.tensors.items()
        if name.startswith(path + ".") and not name.startswith(experts_path + ".")
    }
    for name, axes in followers.items():
        if tuple(tensor_of(module, name).shape[dim] for dim in axes) != (family.experts,):
            raise CheckpointError(
                f"{model.config.model_type}: what follows the expert count must have one entry per expert. Got "
                f"'{path}.{name}' of shape {list(tensor_of(module, name).shape)} for {family.experts} experts instead. "
                f"This family needs an adapter plugin."
            )
    rows = [name for name, dims in followers.items() if dims == (0,) and tensor_of(module, name).ndim == 2]
    if len(rows) != 1:
        raise CheckpointError(
            f"{model.config.model_type}: '{path}' must have one router matrix with a row per expert. "
            f"Got {', '.join(rows) or 'none'} instead. This family needs an adapter plugin."
        )
    router = module.get_submodule(rows[0].rpartition(".")[0])
    number = re.search(r"\.(\d+)(\.|$)", path)
    if number is None:
        raise CheckpointError(
            f"{model.config.model_type}: MoE blocks must lie in numbered decoder layers. Got '{path}' instead. "
            f"This family needs an adapter plugin."
        )
    dims = LayerDims(
        layer=int(number.group(1)),
        experts=family.experts,
        top_k=_top_k(model.config, router, module),
        width=family.blocks_width,
        hidden=int(experts.down_proj.shape[2 if experts.is_transposed else 1]),
        **group_rules(model.config, router),
    )
    per_expert = {name: dims_[0] for name, dims_ in followers.items() if name != rows[0]}
    return UniversalBlock(dims.layer, path, dims, module, experts, experts_path, rows[0], per_expert, family)


def _top_k(config: Any, router: nn.Module, block: nn.Module) -> int:
    for owner in (router, block):
        if type(vars(owner).get("top_k")) is int:
            return vars(owner)["top_k"]
    for name in ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"):
        if type(getattr(config, name, None)) is int:
            return getattr(config, name)
    raise CheckpointError(
        f"{config.model_type}: the router must say how many experts a token takes. Got no top-k field instead. "
        f"This family needs an adapter plugin."
    )


def _refuse_unexplained(model: Any, blocks: list[UniversalBlock], count: Probe) -> None:
    for block in blocks:
        if vars(block.experts).get("has_post_expert_norm"):
            raise CheckpointError(
                f"{model.config.model_type}: experts must end with their down projection. Got a norm after it in "
                f"'{block.experts_path}' instead. This family needs an adapter plugin."
            )
        for name, tensor in block.module.named_buffers():
            if not tensor.is_floating_point() and tensor.numel() > 1:
                raise CheckpointError(
                    f"{model.config.model_type}: a MoE block must hold weights only. Got a table of integers "
                    f"(expert ids?) in '{block.path}.{name}' instead. This family needs an adapter plugin."
                )
    explained = {name for block in blocks for name in block.tensors()}
    for name in count.tensors:
        if name not in explained:
            raise CheckpointError(
                f"{model.config.model_type}: everything that follows '{'.'.join(count.field)}' must lie in a MoE "
                f"block. Got '{name}' outside instead. This family needs an adapter plugin."
            )


@hookimpl
def dernkit_adapters() -> list[type]:
    """The adapter that serves every declared family."""
    return [Universal]
