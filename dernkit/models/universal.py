"""The adapter for every family whose experts lie in a known layout: what transformers declares, and a few more.

Two meta builds say what follows the expert count (see `dernkit.models.probe`). What neither they nor the layout
explains is refused, never guessed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

from torch import nn

from dernkit.api import Block, hookimpl
from dernkit.errors import CheckpointError
from dernkit.models.block import UniversalBlock, tensor_of
from dernkit.models.family import Family, holder, layer_number, layout_of
from dernkit.models.groups import group_rules
from dernkit.models.layout import Layout
from dernkit.models.layouts import LAYOUTS
from dernkit.types import LayerDims

REFUSED = {
    "DogeCDMoE": "experts of one neuron each, kept in an embedding: there is nothing inside them to recombine",
    "JetMoeMoA": "attention heads that are experts too and follow the same count",
    "NllbMoeExperts": "a router that transformers runs wrongly (every token goes to the experts 0 and 1)",
    "SwitchTransformersExperts": "an encoder and a decoder, which a stream of tokens does not calibrate",
    "Ernie4_5_VLMoeMoeBlock": "experts for images beside those for text, which text does not calibrate",
}
"""Modules of transformers that are not compressed, and why."""


@final
@dataclass(frozen=True)
class Universal:
    """All MoE families of transformers whose experts lie in a known layout."""

    name: ClassVar[str] = "universal"

    def blocks(self, model: Any) -> list[Block]:
        """All MoE blocks in layer order; empty when there are no experts in a known layout."""
        for module in model.modules():
            if reason := REFUSED.get(type(module).__name__):
                raise CheckpointError(
                    f"{model.config.model_type}: every expert must be a feed-forward network that text calibrates. "
                    f"Got {reason}, instead. This family is not supported."
                )
        return blocks_by_layout(model, LAYOUTS)


def blocks_by_layout(model: Any, layouts: Sequence[Layout]) -> list[Block]:
    """The MoE blocks whose experts one of the layouts claims, in layer order.

    Raises:
        CheckpointError: something that follows the expert count is not understood.
    """
    found = {path: layout for path, module in model.named_modules() if (layout := layout_of(module, layouts))}
    if not found:
        return []
    sizes = {path: layout.unpack(model.get_submodule(path)).up.shape for path, layout in found.items()}
    counts, widths = ({size[dim] for size in sizes.values()} for dim in (0, 1))
    if len(counts) != 1 or len(widths) != 1:
        raise CheckpointError(
            f"{model.config.model_type}: all MoE layers must have one expert count and one width. "
            f"Got counts {sorted(counts)} and widths {sorted(widths)} instead."
        )
    family = Family.of(model, found, counts.pop(), widths.pop())
    blocks = [_block(model, path, layout, family) for path, layout in found.items()]
    _refuse_unexplained(model, blocks, family)
    return list(blocks)


def _block(model: Any, experts_path: str, layout: Layout, family: Family) -> UniversalBlock:
    path = family.block(experts_path)
    module, experts = model.get_submodule(path), model.get_submodule(experts_path)
    weights = layout.unpack(experts)
    own = {f"{experts_path}.{name}" for name in layout.pack(experts, weights)}
    if layout.expert_modules is not None or layout.router is not None:
        _check_members(model, experts_path, layout, own, family)
    followers = {
        name.removeprefix(path + "."): dims
        for name, dims in family.count.tensors.items()
        if name.startswith(path + ".") and name not in own
    }
    for name, dims in followers.items():
        if list(dims.values()) != [family.experts]:
            raise CheckpointError(
                f"{model.config.model_type}: what follows the expert count must have one entry per expert. Got "
                f"'{path}.{name}' of shape {list(tensor_of(module, name).shape)} for {family.experts} experts instead. "
                f"This family needs an adapter plugin."
            )
    rows = [name for name, dims in followers.items() if list(dims) == [0] and tensor_of(module, name).ndim == 2]
    if len(rows) != 1:
        raise CheckpointError(
            f"{model.config.model_type}: '{path}' must have one router matrix with a row per expert. "
            f"Got {', '.join(rows) or 'none'} instead. This family needs an adapter plugin."
        )
    router = module.get_submodule(rows[0].rpartition(".")[0])
    dims_ = LayerDims(
        layer=_layer(model, path),
        experts=family.experts,
        top_k=layout.top_k(module) or _top_k(model.config, router, module),
        width=family.width,
        hidden=int(weights.down.shape[1]),
        **group_rules(model.config.get_text_config(), router),
    )
    per_expert = {name: next(iter(dims)) for name, dims in followers.items() if name != rows[0]}
    tables = tuple(name for name, _ in _integer_tables(module))
    return UniversalBlock(dims_.layer, path, dims_, module, experts_path, layout, rows[0], per_expert, tables, family)


def _check_members(model: Any, path: str, layout: Layout, own: set[str], family: Family) -> None:
    """A list of experts has one module for each and nothing that the layout does not name: it would not move along."""
    if layout.expert_modules is None:
        raise CheckpointError(
            f"{model.config.model_type}: a layout with a router must say which modules the block calls. "
            f"Got none for '{path}' instead. Set `expert_modules` in {type(layout).__name__}."
        )
    inside = holder(path, layout)
    found = {f"{inside}.{name}" for name in model.get_submodule(inside).state_dict()}
    if found != own:
        raise CheckpointError(
            f"{model.config.model_type}: experts must hold the tensors that their layout packs. Got "
            f"'{min(found ^ own)}' in {'the model' if min(found ^ own) in found else 'the layout'} only instead. "
            f"This family needs another layout."
        )
    if len(layout.members(model.get_submodule(path))) != family.experts:
        raise CheckpointError(
            f"{model.config.model_type}: '{inside}' must hold one module for each of the {family.experts} experts. "
            f"Got {len(layout.members(model.get_submodule(path)))} instead. This family needs another layout."
        )
    if layout.router is None and family.block(path) == path:
        raise CheckpointError(
            f"{model.config.model_type}: a layout that claims a whole MoE block must name its router. "
            f"Got none for '{path}' instead. Set `router` in {type(layout).__name__}."
        )


def _layer(model: Any, path: str) -> int:
    number = layer_number(path)
    if number < 0:
        raise CheckpointError(
            f"{model.config.model_type}: MoE blocks must lie in numbered decoder layers. Got '{path}' instead. "
            f"This family needs an adapter plugin."
        )
    return number


def _top_k(config: Any, router: nn.Module, block: nn.Module) -> int:
    for owner in (router, block):
        if type(vars(owner).get("top_k")) is int:
            return vars(owner)["top_k"]
    text = config.get_text_config()
    for name in ("num_experts_per_tok", "moe_k", "moe_topk", "top_k_experts"):
        if type(getattr(text, name, None)) is int:
            return getattr(text, name)
    raise CheckpointError(
        f"{config.model_type}: the router must say how many experts a token takes. Got no top-k field instead. "
        f"This family needs an adapter plugin."
    )


def _integer_tables(module: nn.Module) -> list[tuple[str, Any]]:
    return [(n, t) for n, t in module.named_buffers() if not t.is_floating_point() and t.numel() > 1]


def _refuse_unexplained(model: Any, blocks: Sequence[UniversalBlock], family: Family) -> None:
    for block in blocks:
        for name, tensor in _integer_tables(block.module):
            if tensor.ndim != 2 or tensor.shape[1] != block.dims.top_k:
                raise CheckpointError(
                    f"{model.config.model_type}: a table of integers in a MoE block must name {block.dims.top_k} "
                    f"experts per token id. Got '{block.path}.{name}' of shape {list(tensor.shape)} instead. "
                    f"This family needs an adapter plugin."
                )
    explained = {name for block in blocks for name in block.tensors()}
    for name in family.count.tensors:
        if name not in explained:
            raise CheckpointError(
                f"{model.config.model_type}: everything that follows '{'.'.join(family.count.field)}' must lie in a "
                f"MoE block. Got '{name}' outside instead. This family needs an adapter plugin."
            )


@hookimpl
def dernkit_adapters() -> list[type]:
    """The adapter that serves every family of transformers."""
    return [Universal]
