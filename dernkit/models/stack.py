"""Where a model has its MoE blocks: the adapter that claims it, and the stack of decoder layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dernkit.api import Adapter, Block
from dernkit.errors import CheckpointError, ContractError, DernkitError
from dernkit.sentences import reason

_COUNT_NAMES = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def find_blocks(model: Any, adapters: Sequence[Adapter]) -> list[Block]:
    """The MoE blocks that exactly one adapter claims.

    Raises:
        CheckpointError: no adapter does (not a MoE, or an undeclared one), or several do.
        ContractError: an adapter raised something else.
    """
    claims = {adapter.name: blocks for adapter in adapters if (blocks := _claimed(adapter, model))}
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


def _claimed(adapter: Adapter, model: Any) -> list[Block]:
    try:
        return adapter.blocks(model)
    except DernkitError:
        raise
    except (Exception, SystemExit) as error:
        raise ContractError(
            f"adapter '{adapter.name}': blocks must raise nothing but a DernkitError (law no_exception). "
            f"Got {type(error).__name__}: {reason(error)} instead. Fix the plugin, or uninstall it.",
            law="no_exception",
            kind="adapter",
            component=adapter.name,
        ) from error


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
