"""One MoE block whose experts transformers declares: experts module ⇄ ExpertBank, and surgery.

The declaration's flags say how the fused weights lie: with or without gate and bias, transposed, concatenated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dernkit.errors import CheckpointError
from dernkit.models.probe import Field, Probe, probe_field
from dernkit.models.router_kind import router_kind
from dernkit.types import CompressedLayer, ExpertBank, LayerDims


def is_declared_experts(module: nn.Module) -> bool:
    """Whether transformers declares the module as a collection of experts."""
    return {"has_gate", "has_bias", "is_transposed", "is_concatenated"} <= vars(module).keys()


@dataclass(slots=True)
class UniversalBlock:
    """One MoE block of a live (or meta) model; see :class:`dernkit.api.Block`."""

    layer: int
    path: str
    dims: LayerDims
    module: Any
    experts: Any
    experts_path: str
    router_name: str
    per_expert_dims: dict[str, int]
    """Tensor name below the block -> the dimension that counts experts."""
    family: Family

    def bank(self) -> ExpertBank:
        experts = self.experts
        names = {name for name, _ in experts.named_parameters(recurse=False)}
        gate, up = self._rows(experts.gate_up_proj if "gate_up_proj" in names else experts.up_proj)
        gate_bias = up_bias = down_bias = None
        if experts.has_bias:
            gate_bias, up_bias = self._halves(experts.gate_up_proj_bias if gate is not None else experts.up_proj_bias)
            down_bias = experts.down_proj_bias.data
        down = experts.down_proj.data
        return ExpertBank(
            dims=self.dims,
            gate=gate,
            up=up,
            down=down.transpose(1, 2) if experts.is_transposed else down,
            gate_bias=gate_bias,
            up_bias=up_bias,
            down_bias=down_bias,
            router=tensor_of(self.module, self.router_name),
            per_expert={name: tensor_of(self.module, name) for name in self.per_expert_dims},
            act=self._activation,
        )

    def router_kind(self) -> str:
        router = self.module.get_submodule(self.router_name.rpartition(".")[0])
        return router_kind(router, self.dims.hidden)

    def tensors(self) -> dict[str, Tensor]:
        experts = {f"{self.experts_path}.{name}": p.data for name, p in self.experts.named_parameters()}
        names = [self.router_name, *self.per_expert_dims]
        return experts | {f"{self.path}.{name}": tensor_of(self.module, name) for name in names}

    def resized(self, compressed: CompressedLayer) -> dict[str, Tensor]:
        if compressed.up.shape[1] != self.dims.width:
            self.family.width()  # refuses a family whose width cannot change
        rest = {self.router_name: compressed.router, **compressed.per_expert}
        experts = {f"{self.experts_path}.{name}": tensor for name, tensor in self._fused(compressed).items()}
        return experts | {f"{self.path}.{name}": tensor for name, tensor in rest.items()}

    def replace(self, compressed: CompressedLayer) -> None:
        for name, tensor in self.resized(compressed).items():
            _set(self.module, name.removeprefix(self.path + "."), tensor)
        if compressed.up.shape[1] != self.dims.width:
            self._resize(self.family.width().attributes, compressed.up.shape[1])
        self._resize(self.family.count.attributes, len(compressed.router))

    def on_routing(self, callback: Callable[[Tensor, Tensor, Tensor], None]) -> RemovableHandle:
        def hook(module: nn.Module, args: tuple[Tensor, Tensor, Tensor]) -> None:
            inputs, chosen, coefficients = args
            callback(inputs.reshape(-1, inputs.shape[-1]), chosen, coefficients)

        return self.experts.register_forward_pre_hook(hook)

    def config_changes(self, experts: int, width: int) -> dict[tuple[str, ...], int]:
        return self.family.fields(experts, width)

    def _resize(self, attributes: dict[str, set[str]], value: int) -> None:
        for path, names in attributes.items():
            if path == self.path or path.startswith(self.path + "."):
                module = self.module.get_submodule(path.removeprefix(self.path).removeprefix("."))
                for name in names:
                    setattr(module, name, value)

    def _activation(self, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return self.experts.act_fn(up)
        return self.experts._apply_gate(self._joined(gate, up, dim=-1))

    def _rows(self, weight: Tensor) -> tuple[Tensor | None, Tensor]:
        return self._halves(weight.data.transpose(1, 2) if self.experts.is_transposed else weight.data)

    def _halves(self, fused: Tensor) -> tuple[Tensor | None, Tensor]:
        """Split rows [E, 2W, ...] into gate and up [E, W, ...]."""
        if not self.experts.has_gate:
            return None, fused
        if self.experts.is_concatenated:
            return fused[:, : self.dims.width], fused[:, self.dims.width :]
        return fused[:, ::2], fused[:, 1::2]

    def _joined(self, gate: Tensor | None, up: Tensor, dim: int) -> Tensor:
        if gate is None:
            return up
        if self.experts.is_concatenated:
            return torch.cat([gate, up], dim=dim)
        return torch.stack([gate, up], dim=dim if dim < 0 else dim + 1).flatten(
            *((-2, -1) if dim < 0 else (dim, dim + 1))
        )

    def _fused(self, new: CompressedLayer) -> dict[str, Tensor]:
        prefix = "gate_up_proj" if self.experts.has_gate else "up_proj"
        rows, down = self._joined(new.gate, new.up, dim=1), new.down
        if self.experts.is_transposed:
            rows, down = rows.transpose(1, 2), down.transpose(1, 2)
        fused = {prefix: rows.contiguous(), "down_proj": down.contiguous()}
        if new.up_bias is not None and new.down_bias is not None:
            fused[f"{prefix}_bias"] = self._joined(new.gate_bias, new.up_bias, dim=1)
            fused["down_proj_bias"] = new.down_bias
        return fused


def tensor_of(module: Any, name: str) -> Tensor:
    """The data of a parameter or buffer below ``module``."""
    parent, _, leaf = name.rpartition(".")
    return getattr(module.get_submodule(parent), leaf).data


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    owner = module.get_submodule(parent)
    if leaf in owner._parameters:
        value = nn.Parameter(value, requires_grad=False)
    setattr(owner, leaf, value)


@dataclass(slots=True)
class Family:
    """What a model's blocks share: the fields that set expert count and width, and what follows them."""

    model: Any
    count: Probe
    experts: int
    blocks_width: int
    _width: Probe | None = None

    def width(self) -> Probe:
        """The probe of the expert width; refuses families in which other tensors follow the same field."""
        if self._width is None:
            self._width = probe_field(self.model, self.blocks_width, _experts_widened, "expert width")
        coupled = [name for name in self._width.tensors if not self._inside_experts(name)]
        if coupled:
            raise CheckpointError(
                f"{self.model.config.model_type}: only experts may follow '{'.'.join(self._width.field)}' when their "
                f"width changes. Got '{coupled[0]}' following it too instead. Use a merge that keeps the width."
            )
        return self._width

    def _inside_experts(self, name: str) -> bool:
        return is_declared_experts(self.model.get_submodule(name.rpartition(".")[0]))

    def fields(self, experts: int, width: int) -> dict[Field, int]:
        """Config field -> value for a new expert count and width."""
        fields = {self.count.field: experts}
        if width != self.blocks_width:
            fields[self.width().field] = width
        return fields


def experts_grown(model: nn.Module, other: nn.Module) -> bool:
    """Whether ``other`` has more experts than ``model``, and as wide ones."""
    return _experts_changed(model, other, lambda dims: 0 in dims)


def _experts_widened(model: nn.Module, other: nn.Module) -> bool:
    return _experts_changed(model, other, lambda dims: bool(dims) and 0 not in dims)


def _experts_changed(model: Any, other: Any, counts: Any) -> bool:
    """Whether every declared experts module has only weight shapes that changed as ``counts`` says."""
    pairs = [(a, b) for a, b in zip(model.modules(), other.modules(), strict=False) if is_declared_experts(a)]
    return bool(pairs) and all(
        counts({d for d, (m, n) in enumerate(zip(a.down_proj.shape, b.down_proj.shape, strict=True)) if m != n})
        for a, b in pairs
    )
