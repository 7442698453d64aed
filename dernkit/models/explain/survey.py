"""All kinds of MoE blocks of a model, explained, and compared with the adapter that claims them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from dernkit.api import Adapter, Block
from dernkit.errors import CheckpointError
from dernkit.models.explain.agreement import contradictions
from dernkit.models.explain.calls import Call, first_calls
from dernkit.models.explain.explanation import Explanation, explain
from dernkit.models.explain.smaller import smaller_config
from dernkit.models.probe import build_on_meta
from dernkit.models.stack import find_blocks

_LARGEST = 2**30
"""Parameters of a module that is run: 4 GB in float32."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One kind of MoE block."""

    path: str
    module: nn.Module
    """The block on the meta device, or (when an adapter claims it) with random weights; maybe of a smaller config."""
    explanation: Explanation
    contradictions: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found in a model."""

    refusal: str | None
    """Why no adapter claims the model; None when one does."""
    findings: tuple[Finding, ...]
    not_explained: tuple[str, ...]
    """Blocks of an adapter, or modules too large to run, that could not be explained, in words."""
    config: Any
    """The model's config, or a smaller one of the same architecture that was used instead."""


def survey(model_class: type[nn.Module], config: Any, adapters: Sequence[Adapter]) -> Survey:
    """Explain one block of each kind. Weights are never read, and only one block at a time is held in memory."""
    config = smaller_config(model_class, config)
    model: Any = build_on_meta(model_class, config)
    blocks: list[Block] = []
    refusal: str | None = None
    try:
        blocks = find_blocks(model, adapters)
    except CheckpointError as error:
        refusal = str(error)
    rehearsal: Any = build_on_meta(model_class, config)
    rehearsal.set_experts_implementation("batched_mm")  # no loops over experts, where transformers can do without
    calls = first_calls(rehearsal)
    model.set_experts_implementation("eager")
    problems: list[str] = []
    found = _claimed(model, blocks, calls, problems) if blocks else _unclaimed(model, calls, problems)
    return Survey(refusal, tuple(found), tuple(problems), config)


def _claimed(model: nn.Module, blocks: list[Block], calls: dict[str, Call], problems: list[str]) -> Iterator[Finding]:
    kinds: set[tuple[str, ...]] = set()
    for block in blocks:
        module = model.get_submodule(block.path)
        kind = _kind(module)
        if kind in kinds:
            continue
        kinds.add(kind)
        explanation = _try(block.path, module, calls, problems)
        if explanation is None:
            problems.append(f"{block.path}: no parameters are used by some tokens only")
        elif isinstance(explanation, Explanation):
            yield Finding(block.path, module, explanation, tuple(contradictions(block, module, explanation)))


def _unclaimed(model: nn.Module, calls: dict[str, Call], problems: list[str]) -> Iterator[Finding]:
    """Try the modules of decoder layers, small ones first; what holds a found block is not tried."""
    modules = {path: module for path, module in model.named_modules() if re.search(r"(^|\.)\d+(\.|$)", path)}
    kinds: set[tuple[str, ...]] = set()
    found: set[tuple[str, ...]] = set()
    partly: list[Finding] = []
    for path, module in sorted(modules.items(), key=lambda pair: _size(pair[1])):
        kind = _kind(module)
        if (
            len(list(module.parameters())) < 3
            or kind in kinds
            or any(_kind(inner) in found for inner in module.modules())
        ):
            continue
        kinds.add(kind)
        explanation = _try(path, module, calls, problems if _size(module) > _LARGEST else [])
        if isinstance(explanation, Explanation):
            finding = Finding(path, module, explanation, ())
            if explanation.router is None:
                partly.append(finding)
                continue
            found.add(kind)
            yield finding
    if not found:
        yield from partly[:1]


def _try(path: str, module: nn.Module, calls: dict[str, Call], problems: list[str]) -> Explanation | str | None:
    """An explanation; None when nothing is routed; a sentence, which is among ``problems`` then, when it cannot run."""
    if _size(module) > _LARGEST:
        problems.append(f"{path}: {_size(module):,} parameters are too many to be run for an explanation")
        return problems[-1]
    call = calls.get(path) or _plain_call(path, module, calls)
    if call is None:
        problems.append(f"{path}: how the model calls it could not be recorded")
        return problems[-1]
    try:
        return explain(module, *call, where=path)
    except CheckpointError as error:
        problems.append(str(error))
        return problems[-1]


def _plain_call(path: str, module: nn.Module, calls: dict[str, Call]) -> Call | None:
    """For what the recorded run did not reach: hidden states alone, as the layer around it got them."""
    required = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    ]
    outer = [
        calls[path[:end]]
        for end in (m.end(1) for m in re.finditer(r"((?:^|\.)\d+)(?=\.|$)", path))
        if path[:end] in calls
    ]
    tensors = [
        leaf for call in outer for leaf in tree_leaves(call) if isinstance(leaf, Tensor) and leaf.is_floating_point()
    ]
    if len(required) != 1 or not tensors:
        return None
    return (torch.empty_like(tensors[0], device="meta"),), {}


def _kind(module: nn.Module) -> tuple[str, ...]:
    return tuple(f"{type(inner).__module__}.{type(inner).__qualname__}" for inner in module.modules())


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
