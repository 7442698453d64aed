"""The adapter for every family whose experts class transformers declares (``@use_experts_implementation``).

The declaration's flags say how the fused weights lie (gate, bias, transposed, concatenated); two meta builds say what
else follows the expert count (see `dernkit.models.probe`). What neither explains is refused, never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dernkit.api import Block, hookimpl
from dernkit.errors import CheckpointError
from dernkit.models.probe import Field, Probe, probe_field
from dernkit.models.router_kind import router_kind
from dernkit.types import CompressedLayer, ExpertBank, LayerDims

COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


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
            router=_tensor(self.module, self.router_name),
            per_expert={name: _tensor(self.module, name) for name in self.per_expert_dims},
            act=self._activation,
        )

    def router_kind(self) -> str:
        router = self.module.get_submodule(self.router_name.rpartition(".")[0])
        return router_kind(router, self.dims.hidden)

    def tensors(self) -> dict[str, Tensor]:
        experts = {f"{self.experts_path}.{name}": p.data for name, p in self.experts.named_parameters()}
        names = [self.router_name, *self.per_expert_dims]
        return experts | {f"{self.path}.{name}": _tensor(self.module, name) for name in names}

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


def _tensor(module: Any, name: str) -> Tensor:
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


def _experts_grown(model: nn.Module, other: nn.Module) -> bool:
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
        count = probe_field(model, counts.pop(), _experts_grown, "expert count")
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
    rows = [name for name, dims in followers.items() if dims == (0,) and _tensor(module, name).ndim == 2]
    if len(rows) != 1:
        raise CheckpointError(
            f"{model.config.model_type}: '{path}' must have one router matrix with a row per expert. "
            f"Got {', '.join(rows) or 'none'} instead. This family needs an adapter plugin."
        )
    router = module.get_submodule(rows[0].rpartition(".")[0])
    number = re.search(r"\.(\d+)(\.|$)", path)
    dims = LayerDims(
        layer=int(number.group(1)) if number else 0,
        experts=family.experts,
        top_k=_top_k(model.config, router, module),
        width=family.blocks_width,
        hidden=int(experts.down_proj.shape[2 if experts.is_transposed else 1]),
        **_groups(router),
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


def _groups(router: nn.Module) -> dict[str, int]:
    """Group limits as the router applies them; DeepSeek-V2's group score is a maximum, all others' a sum of two."""
    fields = vars(router)
    groups = fields.get("num_group", fields.get("n_group")) or 1
    method = fields.get("topk_method")
    if groups == 1 or method == "greedy":
        return {}
    candidates = 1 if method == "group_limited_greedy" else 2
    return {"groups": groups, "top_k_groups": fields.get("topk_group") or groups, "candidates_per_group": candidates}


def _refuse_unexplained(model: Any, blocks: list[UniversalBlock], count: Probe) -> None:
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
