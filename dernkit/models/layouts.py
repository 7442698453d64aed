"""How transformers' experts modules hold their weights: a general layout, and one for each undeclared class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dernkit.errors import CheckpointError
from dernkit.models.layout import Callback, Layout, halves, joined
from dernkit.types import ExpertWeights


class Declared(Layout):
    """Experts that transformers declares (``@use_experts_implementation``): its flags say how the weights lie."""

    def claims(self, module: nn.Module) -> bool:
        return {"has_gate", "has_bias", "is_transposed", "is_concatenated"} <= vars(module).keys()

    def unpack(self, module: Any) -> ExpertWeights:
        rows_name = _rows_name(module)
        _check_names(module, rows_name)
        gate, up = self._split(module, _weight(module, rows_name))
        gate_bias = up_bias = down_bias = None
        if module.has_bias:
            gate_bias, up_bias = self._split(module, getattr(module, f"{rows_name}_bias").data)
            down_bias = module.down_proj_bias.data
        return ExpertWeights(gate, up, _weight(module, "down_proj"), gate_bias, up_bias, down_bias)

    def _split(self, module: Any, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        return halves(rows, concatenated=module.is_concatenated) if module.has_gate else (None, rows)

    def _join(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        return up if gate is None else joined(gate, up, concatenated=module.is_concatenated)

    def pack(self, module: Any, weights: ExpertWeights) -> dict[str, Tensor]:
        rows_name = _rows_name(module)
        rows, down = self._join(module, weights.gate, weights.up), weights.down
        if module.is_transposed:
            rows, down = rows.transpose(1, 2), down.transpose(1, 2)
        packed = {rows_name: rows.contiguous(), "down_proj": down.contiguous()}
        if weights.up_bias is not None and weights.down_bias is not None:
            packed[f"{rows_name}_bias"] = self._join(module, weights.gate_bias, weights.up_bias)
            packed["down_proj_bias"] = weights.down_bias
        return packed

    def activation(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        if gate is None:
            return module.act_fn(up)
        if module.is_concatenated:
            return module._apply_gate(torch.cat([gate, up], dim=-1))
        return module._apply_gate(torch.stack([gate, up], dim=-1).flatten(-2))

    def finish(self, module: Any) -> Callable[[Tensor], Tensor] | None:
        return module.post_expert_norm if vars(module).get("has_post_expert_norm") else None


def _rows_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _weight(module: Any, name: str) -> Tensor:
    weight = getattr(module, name).data
    return weight.transpose(1, 2) if module.is_transposed else weight


def _check_names(module: Any, rows_name: str) -> None:
    wanted = {rows_name, "down_proj"} | ({f"{rows_name}_bias", "down_proj_bias"} if module.has_bias else set())
    found = {name for name, _ in module.named_parameters(recurse=False)}
    if found != wanted:
        raise CheckpointError(
            f"{type(module).__name__}: declared experts must hold {', '.join(sorted(wanted))} and no other parameter. "
            f"Got {', '.join(sorted(found)) or 'none'} instead. This family needs an adapter plugin."
        )
    if any(getattr(module, name).ndim != 3 for name in (rows_name, "down_proj")):
        raise CheckpointError(
            f"{type(module).__name__}: declared experts must be fused, [E, rows, columns]. Got tensors of other "
            f"dimensions instead. This family needs an adapter plugin."
        )


class Step3p7(Layout):
    """Step-3.7: as declared experts are, without the declaration."""

    def claims(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Step3p7Experts"

    def unpack(self, module: Any) -> ExpertWeights:
        return ExpertWeights(*halves(module.gate_up_proj.data), module.down_proj.data)

    def pack(self, module: Any, weights: ExpertWeights) -> dict[str, Tensor]:
        return {"gate_up_proj": _fused(weights), "down_proj": weights.down}

    def activation(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        return module._apply_gate(up if gate is None else torch.cat([gate, up], dim=-1))


class LongcatFlash(Layout):
    """LongCat-Flash: identity experts follow the routed ones, with rows of gate and up that nothing reads."""

    def claims(self, module: nn.Module) -> bool:
        return type(module).__name__ == "LongcatFlashExperts"

    def unpack(self, module: Any) -> ExpertWeights:
        return ExpertWeights(*halves(module.gate_up_proj.data[: module.num_routed_experts]), module.down_proj.data)

    def pack(self, module: Any, weights: ExpertWeights) -> dict[str, Tensor]:
        rows, unread = _fused(weights), module.gate_up_proj.data[module.num_routed_experts :]
        if unread.shape[1:] != rows.shape[1:]:
            unread = unread.new_zeros(len(unread), *rows.shape[1:])
        return {"gate_up_proj": torch.cat([rows, unread.to(rows.device)]), "down_proj": weights.down}


class Llama4(Layout):
    """Llama-4: transposed weights, every expert runs on every token, times a coefficient that is 0 for most."""

    coefficient_on_input = True

    def claims(self, module: nn.Module) -> bool:
        return type(module).__name__ == "Llama4TextExperts"

    def unpack(self, module: Any) -> ExpertWeights:
        return ExpertWeights(*halves(module.gate_up_proj.data.transpose(1, 2)), module.down_proj.data.transpose(1, 2))

    def pack(self, module: Any, weights: ExpertWeights) -> dict[str, Tensor]:
        return {
            "gate_up_proj": _fused(weights).transpose(1, 2).contiguous(),
            "down_proj": weights.down.transpose(1, 2).contiguous(),
        }

    def listen(self, block: Any, module: nn.Module, callback: Callback) -> RemovableHandle:
        def hook(router: Any, args: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
            coefficients, chosen = output[0].topk(router.top_k, dim=1)
            callback(args[0].reshape(-1, args[0].shape[-1]), chosen, coefficients)

        return block.router.register_forward_hook(hook)

    def run(self, module: Any, hidden: Tensor, chosen: Tensor, coefficients: Tensor) -> Tensor:
        scores = hidden.new_zeros(len(hidden), module.num_experts).scatter_(1, chosen, coefficients)
        out = module((hidden.repeat(module.num_experts, 1)) * scores.T.reshape(-1, 1))
        return out.reshape(module.num_experts, len(hidden), -1).sum(dim=0)


class Dbrx(Layout):
    """DBRX: all experts flattened into matrices [E*W, H], the down projection by rows."""

    def claims(self, module: nn.Module) -> bool:
        return type(module).__name__ == "DbrxExperts"

    def unpack(self, module: Any) -> ExpertWeights:
        shape = (module.num_experts, module.ffn_hidden_size, module.hidden_size)
        gate, up, down = (getattr(module.mlp, name).data.view(shape) for name in ("w1", "v1", "w2"))
        return ExpertWeights(gate, up, down.transpose(1, 2))

    def pack(self, module: Any, weights: ExpertWeights) -> dict[str, Tensor]:
        if weights.gate is None:
            raise ValueError("DBRX experts have gates")
        rows = {"mlp.w1": weights.gate, "mlp.v1": weights.up, "mlp.w2": weights.down.transpose(1, 2)}
        return {name: tensor.contiguous().flatten(0, 1) for name, tensor in rows.items()}

    def activation(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        return module.mlp.activation_fn(gate) * up

    def run(self, module: Any, hidden: Tensor, chosen: Tensor, coefficients: Tensor) -> Tensor:
        return module(hidden[None], chosen, coefficients)[0]


def _fused(weights: ExpertWeights) -> Tensor:
    if weights.gate is None:
        raise ValueError("these experts have gates")
    return joined(weights.gate, weights.up)


LAYOUTS: tuple[Layout, ...] = (Declared(), Step3p7(), LongcatFlash(), Llama4(), Dbrx())
