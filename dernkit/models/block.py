"""One MoE block: experts module ⇄ ExpertBank through a layout, and surgery on all that follows count and width."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dernkit.errors import CheckpointError
from dernkit.models.experts_check import check_experts
from dernkit.models.family import Family
from dernkit.models.layout import Layout
from dernkit.models.padding import padding_bias, reads_count
from dernkit.models.probe import Probe
from dernkit.models.rehearsal import Rehearsal, rehearse
from dernkit.models.rerouting import on_router_inputs, route_of
from dernkit.types import CompressedLayer, ExpertBank, ExpertWeights, LayerDims, Route


@dataclass(slots=True)
class UniversalBlock:
    """One MoE block of a live (or meta) model; see :class:`dernkit.api.Block`."""

    layer: int
    path: str
    dims: LayerDims
    module: Any
    experts_path: str
    layout: Layout
    router_name: str
    per_expert_dims: dict[str, int]
    """Tensor name below the block -> the dimension that counts experts."""
    tables: tuple[str, ...]
    """Tables of expert numbers below the block."""
    family: Family

    @property
    def experts(self) -> Any:
        """The experts module."""
        return self.module.get_submodule(self.experts_below)

    @property
    def experts_below(self) -> str:
        """The experts module's path below the block; "" where it is the block."""
        return self.experts_path.removeprefix(self.path).removeprefix(".")

    @property
    def hidden(self) -> int:
        """Size of the vectors that the block reads; its experts may see a projection of them."""
        size = getattr(self.family.model.config.get_text_config(), "hidden_size", None)
        return int(size if size is not None else tensor_of(self.module, self.router_name).shape[1])

    def bank(self) -> ExpertBank:
        experts, layout = self.experts, self.layout
        weights = layout.unpack(experts)
        return ExpertBank(
            dims=self.dims,
            gate=weights.gate,
            up=weights.up,
            down=weights.down,
            gate_bias=weights.gate_bias,
            up_bias=weights.up_bias,
            down_bias=weights.down_bias,
            router=tensor_of(self.module, self.router_name)[: self.dims.experts],
            per_expert={
                name: tensor_of(self.module, name).narrow(dim, 0, self.dims.experts)
                for name, dim in self.per_expert_dims.items()
            },
            act=lambda gate, up: layout.activation(experts, gate, up),
            finish=layout.finish(experts),
            coefficient_on_input=layout.coefficient_on_input,
            tables={name: tensor_of(self.module, name) for name in self.tables},
            router_bias=self.router_bias,
            route=self.route(),
        )

    def route(self, ones: Mapping[str, Collection[str]] = MappingProxyType({})) -> Route:
        """`ExpertBank.route`; ``ones``: see :func:`dernkit.models.rerouting.route_of`."""
        return route_of(self, lambda: self.rehearsal().alone, lambda: self.rehearsal().scale, ones)

    @property
    def router_bias(self) -> str | None:
        """Name of the bias of the linear map that the router's rows are; correction biases have other names."""
        name = self.router_name.removesuffix("weight") + "bias"
        return name if self.router_name.endswith("weight") and name in self.per_expert_dims else None

    def router_kind(self) -> str:
        return self.rehearsal().router

    def width_kind(self) -> str:
        try:
            return self.family.coupling().describe()
        except CheckpointError as error:
            return f"none; {error}"

    def tensors(self) -> dict[str, Tensor]:
        others = (self.router_name, *self.per_expert_dims, *self.tables)
        names = [*self.expert_tensors(), *(f"{self.path}.{name}" for name in others)]
        return {name: tensor_of(self.module, name.removeprefix(self.path + ".")) for name in names}

    def expert_tensors(self) -> list[str]:
        packed = self.layout.pack(self.experts, _without_data(self.layout.unpack(self.experts)))
        return [f"{self.experts_path}.{name}" for name in packed]

    def modules(self, width: int) -> list[str]:
        return [self.path] if width == self.dims.width else [self.path, *self.family.coupled(self.path)]

    def resized(self, compressed: CompressedLayer) -> dict[str, Tensor]:
        packed = self.layout.pack(self.experts, _weights_of(compressed))
        resized = {f"{self.experts_path}.{name}": tensor for name, tensor in packed.items()}
        resized[f"{self.path}.{self.router_name}"] = self._with_extra(self.router_name, compressed.router, 0)
        for name, tensor in compressed.per_expert.items():
            dim = self.per_expert_dims.get(name)
            resized[f"{self.path}.{name}"] = tensor if dim is None else self._with_extra(name, tensor, dim)
        return resized | self._padded(compressed.up.shape[1])

    def _with_extra(self, name: str, kept: Tensor, dim: int) -> Tensor:
        """Append what the model has beyond one entry per expert (rows of identity, skip or shared experts)."""
        whole = tensor_of(self.module, name)
        extra = whole.narrow(dim, self.dims.experts, whole.shape[dim] - self.dims.experts)
        return torch.cat([kept, extra.to(kept.device)], dim=dim) if extra.shape[dim] else kept

    def _padded(self, width: int) -> dict[str, Tensor]:
        if width == self.dims.width:
            return {}
        coupling, padded = self.family.coupling(), {}
        for path in self.family.coupled(self.path):
            for name in coupling.tensors:
                if name.startswith(path + "."):
                    tensor = tensor_of(coupling.modules[path], name.removeprefix(path + "."))
                    padded[name] = coupling.padded(name, tensor, width)
        return padded

    def replace(self, compressed: CompressedLayer) -> None:
        width = compressed.up.shape[1]
        for name, tensor in self.resized(compressed).items():
            _set(self.family.model, name, tensor)
        if width != self.dims.width:
            coupling, coupled = self.family.coupling(), self.family.coupled(self.path)
            self._resize(coupling.width, width, skip=tuple(coupled))
            for path in coupled:
                coupling.resize(path, width)
        self._resize(self.family.count, len(compressed.router))
        self.layout.shrink(self.experts, len(compressed.router))
        self.dims = replace(self.dims, experts=len(compressed.router), width=width)

    def on_router_inputs(self, callback: Callable[[Tensor], None]) -> RemovableHandle:
        return on_router_inputs(self, self.rehearsal().alone, callback)

    def on_routing(self, callback: Callable[[Tensor, Tensor, Tensor], None]) -> RemovableHandle:
        scale = self.rehearsal().scale

        def scaled(inputs: Tensor, chosen: Tensor, coefficients: Tensor) -> None:
            callback(inputs, chosen, coefficients if scale == 1 else coefficients * scale)

        return self.layout.listen(self.module, self.experts, scaled)

    def check(self) -> None:
        check_experts(self)

    def rehearsal(self) -> Rehearsal:
        """What the block does with its router, seen on a random copy of it; blocks of one kind share it.

        Raises:
            CheckpointError: it does not do what the shapes say.
        """
        if self._kind not in self.family.rehearsals:
            self.family.rehearsals[self._kind] = rehearse(self)
        return self.family.rehearsals[self._kind]

    def padding(self) -> str | None:
        if self._kind not in self.family.paddings:
            seen = self.rehearsal()
            self.family.paddings[self._kind] = padding_bias(self, alone=seen.alone, scale=seen.scale)
        return self.family.paddings[self._kind]

    def uneven(self) -> bool:
        if self._kind not in self.family.uneven:
            seen, field = self.rehearsal(), self.family.count.field[-1]
            self.family.uneven[self._kind] = not reads_count(self, field, alone=seen.alone, scale=seen.scale)
        return self.family.uneven[self._kind]

    @property
    def _kind(self) -> tuple[Any, ...]:
        return (type(self.module), self.router_name, tuple(self.per_expert_dims), self.tables)

    def config_changes(self, experts: int, width: int) -> dict[tuple[str, ...], int]:
        return self.family.fields(experts, width)

    def _resize(self, probe: Probe, value: int, skip: tuple[str, ...] = ()) -> None:
        for path, names in probe.attributes.items():
            inside = path == self.path or path.startswith(self.path + ".")
            if inside and not any(path == other or path.startswith(other + ".") for other in skip):
                module = self.family.model.get_submodule(path)
                for name, growth in names.items():
                    setattr(module, name, probe.scaled(vars(module)[name], growth, value))


def _without_data(weights: ExpertWeights) -> ExpertWeights:
    """On the meta device: to learn the names that a layout packs under, all experts need not be copied."""
    given = {field.name: getattr(weights, field.name) for field in fields(weights)}
    empty: Any = {n: None if t is None else torch.empty_like(t, device="meta") for n, t in given.items()}
    return ExpertWeights(**empty)


def _weights_of(layer: CompressedLayer) -> ExpertWeights:
    return ExpertWeights(layer.gate, layer.up, layer.down, layer.gate_bias, layer.up_bias, layer.down_bias)


def tensor_of(module: Any, name: str) -> Tensor:
    """The data of a parameter or buffer below ``module``."""
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf).data


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        part = value.untyped_storage().nbytes() > value.nbytes  # of a stack of experts, which it would keep in memory
        value = nn.Parameter(value.clone() if part else value, requires_grad=False)
    setattr(owner, leaf, value)
