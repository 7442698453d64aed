"""Routers with groups: what they ask of the experts that stay, and how all groups become one.

Such a router divides its experts into equal runs, scores every run by its best experts, and chooses within the best
runs only. transformers does not check that a smaller number of experts still divides: the router then mixes tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from dernkit.api import Block
from dernkit.errors import CheckpointError
from dernkit.models.probe import Field, build_on_meta, candidate_fields, set_field
from dernkit.types import CompressedLayer, ExpertBank, LayerDims, Route

_COUNT = ("num_group", "n_group")
_CHOSEN = ("topk_group",)
"""What routers call the number of groups, and how many of them a token uses."""


def group_rules(config: Any, router: nn.Module) -> dict[str, int]:
    """Fields of `LayerDims`, as the router applies them.

    DeepSeek-V2's group score is a maximum, all others' a sum of two: these need two experts even in a single group.
    """
    own = vars(router)
    fields = {name: getattr(config, name, None) for name in (*_COUNT, *_CHOSEN)} | own
    groups = next((fields[name] for name in _COUNT if fields[name]), None)
    if not groups or fields.get("topk_method") == "greedy":
        return {}
    scored = any(own.get(name) for name in _COUNT) or groups > 1
    candidates = 2 if scored and fields.get("topk_method") != "group_limited_greedy" else 1
    chosen = min(fields.get("topk_group") or groups, groups)
    return {"groups": groups, "top_k_groups": chosen, "candidates_per_group": candidates}


def regrouped(model: Any, blocks: Sequence[Block], *, collapse: bool) -> list[Block]:
    """The same blocks; with ``collapse`` their routers' groups are to become one when the experts are replaced.

    Args:
        model: the model that the blocks belong to, on the meta device or not.
        blocks: all of its MoE blocks.
        collapse: whether to. Blocks without groups stay as they are.

    Raises:
        CheckpointError: no config fields set the groups alone.
    """
    if not collapse or all(block.dims.groups == 1 for block in blocks):
        return list(blocks)
    fields, attributes = _one_group(model, blocks)
    return [_Ungrouped.of(model, block, fields, attributes) for block in blocks]


@dataclass(slots=True)
class _Ungrouped:
    """A block that will have one group; see :class:`dernkit.api.Block`."""

    layer: int
    path: str
    dims: LayerDims
    inner: Block
    model: Any
    fields: Mapping[Field, int]
    attributes: Mapping[str, set[str]]
    """Module path -> its attributes that follow the fields."""

    @classmethod
    def of(cls, model: Any, inner: Block, fields: Mapping[Field, int], attributes: Mapping[str, set[str]]) -> Block:
        dims = replace(inner.dims, groups=1, top_k_groups=1)
        mine = {path: names for path, names in attributes.items() if f"{path}.".startswith(inner.path + ".")}
        return cls(inner.layer, inner.path, dims, inner, model, fields, mine)

    def bank(self) -> ExpertBank:
        below = {path.removeprefix(self.path).removeprefix("."): names for path, names in self.attributes.items()}
        return replace(self.inner.bank(), dims=self.dims, route=self.inner.route(below))

    def route(self, ones: Mapping[str, Collection[str]] = MappingProxyType({})) -> Route:
        return self.inner.route(ones)

    def on_router_inputs(self, callback: Callable[[Tensor], None]) -> Any:
        return self.inner.on_router_inputs(callback)

    def router_kind(self) -> str:
        return self.inner.router_kind()

    def width_kind(self) -> str:
        return self.inner.width_kind()

    def tensors(self) -> Mapping[str, Tensor]:
        return self.inner.tensors()

    def expert_tensors(self) -> Sequence[str]:
        return self.inner.expert_tensors()

    def modules(self, width: int) -> Sequence[str]:
        return self.inner.modules(width)

    def resized(self, compressed: CompressedLayer) -> Mapping[str, Tensor]:
        return self.inner.resized(compressed)

    def padding(self) -> str | None:
        return self.inner.padding()

    def uneven(self) -> bool:
        return self.inner.uneven()

    def replace(self, compressed: CompressedLayer) -> None:
        self.inner = copy.copy(self.inner)  # whoever else holds it remembers its sizes
        self.inner.replace(compressed)
        self.dims = replace(self.inner.dims, groups=1, top_k_groups=1)
        for path, names in self.attributes.items():
            for name in names:
                setattr(self.model.get_submodule(path), name, 1)

    def check(self) -> None:
        self.inner.check()

    def on_routing(self, callback: Callable[[Tensor, Tensor, Tensor], None]) -> Any:
        return self.inner.on_routing(callback)

    def config_changes(self, experts: int, width: int) -> Mapping[tuple[str, ...], int]:
        return {**self.inner.config_changes(experts, width), **self.fields}


def _one_group(model: Any, blocks: Sequence[Block]) -> tuple[dict[Field, int], dict[str, set[str]]]:
    """Config fields -> 1, and the routers' attributes that follow them."""
    dims = blocks[0].dims
    config = copy.deepcopy(model.config)
    fields: dict[Field, int] = {}
    attributes: dict[str, set[str]] = {}
    for names, value in ((_CHOSEN, dims.top_k_groups), (_COUNT, dims.groups)):  # a config may want chosen <= count
        if value == 1:
            continue
        found = []
        for field in candidate_fields(config, value):
            trial = copy.deepcopy(config)
            followers = _followers(model, blocks, trial, field, names, value)
            if all(any(f"{path}.".startswith(block.path + ".") for path in followers) for block in blocks):
                found.append((field, trial, followers))
        if len(found) != 1:
            raise CheckpointError(
                f"{model.config.model_type}: to collapse groups, exactly one config field must set the router's "
                f"'{names[0]}' ({value}). Got {', '.join('.'.join(field) for field, *_ in found) or 'none'} instead. "
                f"Use 'groups: respect'."
            )
        field, config, followers = found[0]
        fields[field] = 1
        for path, own in followers.items():
            attributes.setdefault(path, set()).update(own)
    return fields, attributes


def _followers(
    model: Any, blocks: Sequence[Block], config: Any, field: Field, names: Collection[str], value: int
) -> dict[str, set[str]]:
    """Modules inside the blocks -> those of their attributes ``names`` that become 1 when ``field`` does."""
    try:
        set_field(config, field, 1)
        other: Any = build_on_meta(type(model), config)
    except Exception:  # a config may validate the field against others
        return {}
    followers: dict[str, set[str]] = {}
    twins = dict(other.named_modules())
    for path, module in model.named_modules():
        if path in twins and any(f"{path}.".startswith(block.path + ".") for block in blocks):
            own, new = vars(module), vars(twins[path])
            changed = {name for name in names if own.get(name) == value and new.get(name) == 1}
            if changed:
                followers[path] = changed
    return followers
