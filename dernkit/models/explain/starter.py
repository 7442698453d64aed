"""The beginning of an adapter plugin for a model that no adapter claims, with what was found filled in."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import takewhile

from torch import nn

from dernkit.models.explain.explanation import Explanation, Weight
from dernkit.models.explain.survey import Finding

_TEMPLATE = '''"""An adapter for {family}, begun by `dernkit inspect --explain`. Check what is marked with CHECK."""

from dataclasses import dataclass
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from dernkit.api import Block, hookimpl
from dernkit.architecture import ExpertWeights, Layout, blocks_by_layout


class {name}Layout(Layout):
    """How {owner} holds its weights."""
{declarations}
    def claims(self, module: nn.Module) -> bool:
        return type(module).__name__ == "{owner}"

    def unpack(self, module: Any) -> ExpertWeights:
{unpack}

    def pack(self, module: Any, weights: ExpertWeights) -> dict[str, Tensor]:
{pack}

    def activation(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        {activation}

{routing}

    def top_k(self, block: Any) -> int:
        return {top_k}  # CHECK: how many experts a token uses


@final
@dataclass(frozen=True)
class {name}Adapter:
    """{family}: {experts} experts in each {block}."""

    name: ClassVar[str] = "{slug}"

    def blocks(self, model: Any) -> list[Block]:
        return blocks_by_layout(model, [{name}Layout()])


@hookimpl
def dernkit_adapters() -> list[type]:
    return [{name}Adapter]
'''

_CALLED = """    def routing(self, module: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor, Tensor]:
        hidden, chosen, coefficients = args  # CHECK: what {owner}.forward is called with
        return hidden.reshape(-1, hidden.shape[-1]), chosen, coefficients"""

_ONE_BY_ONE = """    def route(self, block: Any, output: Any) -> tuple[Tensor, Tensor]:
        coefficients, chosen = output.softmax(dim=-1).topk(self.top_k(block))  # CHECK: what {block} makes of the output
        return chosen, coefficients"""


def starting_adapter(finding: Finding, family: str) -> str:
    """The text of a Python module. It assumes nothing that was not found, but for what is marked with CHECK."""
    found = finding.explanation
    prefix, owner = _owner(finding.module, found)
    access = _Access(prefix, owner)
    routing = _ONE_BY_ONE if _calls_one_by_one(finding.module, owner, found) else _CALLED
    name = re.sub(r"\W", "", type(finding.module).__name__)
    return _TEMPLATE.format(
        family=family,
        name=name,
        slug=re.sub(r"[^a-z0-9]+", "-", family.lower()).strip("-"),
        owner=type(owner).__name__,
        block=type(finding.module).__name__,
        experts=found.experts,
        declarations=_indented(_declarations(found, access, routing is _ONE_BY_ONE), 4),
        unpack=_indented(_unpack(found, access)),
        pack=_indented(_pack(found, access)),
        activation=_activation(found, owner),
        routing=routing.format(owner=type(owner).__name__, block=type(finding.module).__name__),
        top_k=_top_k(finding.module, found),
    )


@dataclass(frozen=True)
class _Access:
    """How code reaches the experts' parameters from the module that holds them."""

    prefix: str
    owner: nn.Module

    def local(self, name: str) -> str:
        return name.removeprefix(self.prefix)

    def halves(self, weight: Weight) -> tuple[str, str]:
        """Where the experts lie, with a dot behind it if anywhere, and the parameter's name in each of them."""
        before, after = self.local(weight.name).split("*", 1)
        return before, after.removeprefix(".")

    def count(self, value: int) -> str:
        """The expert count, from an attribute if one has it."""
        for path, module in self.owner.named_modules():
            for name, number in vars(module).items():
                if type(number) is int and number == value:
                    return ".".join(part for part in ("module", path, name) if part)
        return str(value)


def _owner(block: nn.Module, found: Explanation) -> tuple[str, nn.Module]:
    """The innermost module of a class of its own that holds all expert weights, and its prefix in their names."""
    owners = [name.split(".")[:-1] for weight in found.weights for name in weight.names]
    shared = takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))
    common = ".".join(parts[0] for parts in shared)
    module = block.get_submodule(common)
    while common and isinstance(module, nn.ModuleList | nn.ModuleDict) and type(module).__module__.startswith("torch."):
        common = common.rpartition(".")[0]
        module = block.get_submodule(common)
    return (f"{common}." if common else ""), module


def _unpack(found: Explanation, access: _Access) -> list[str]:
    code: list[str] = []
    values: dict[str, str] = {}
    for weight in found.weights:
        bias = "_bias" if weight.role.endswith("bias") else ""
        variable = weight.role.replace(" ", "_")
        code.append(f"{variable} = {_whole(weight, found, access)}")
        if weight.role.startswith("gate and up"):
            first, second = ("up", "gate") if found.order.startswith("up first") else ("gate", "up")
            if found.order == "unknown":
                code.append(f"# CHECK: which rows of {variable} are gate and which are up was not found")
            halves = (
                f"{variable}[:, ::2], {variable}[:, 1::2]"
                if "interleaved" in found.order
                else f"{variable}.chunk(2, dim=1)"
            )
            code.append(f"{first}{bias}, {second}{bias} = {halves}")
            values |= {f"gate{bias}": f"gate{bias}", f"up{bias}": f"up{bias}"}
        else:
            values[variable] = variable
    fields = ("gate", "up", "down", "gate_bias", "up_bias", "down_bias")
    arguments = ", ".join(f"{field}={values.get(field)}" for field in fields)
    missing = [field for field in ("up", "down") if field not in values]
    code += [f"# CHECK: the experiment did not find {' and '.join(missing)}"] if missing else []
    return [*code, f"return ExpertWeights({arguments})"]


def _whole(weight: Weight, found: Explanation, access: _Access) -> str:
    """An expression for [E, rows, columns], or [E, rows] of a bias."""
    count = access.count(found.experts)
    code = f"module.{access.local(weight.name)}.data"
    if weight.stacked:
        name = access.halves(weight)[1]
        code = f'torch.stack([expert.get_parameter("{name}").data for expert in self.members(module).values()])'
    if weight.each > 1:
        code += f".unflatten({weight.dim}, ({count}, -1))"
    if weight.dim:
        code += f".movedim({weight.dim}, 0)"
    if weight.spare:
        code += f"[: {count}]"
    return code + (".transpose(1, 2)" if weight.transposed else "")


def _pack(found: Explanation, access: _Access) -> list[str]:
    code, entries = [], []
    for weight in found.weights:
        variable = weight.role.replace(" ", "_")
        code.append(f"{variable} = {_joined(weight, found)}")
        if weight.spare:
            code.append(
                f"# CHECK: {weight.spare} more entries at the end of {access.local(weight.name)} must be put back"
            )
        if weight.stacked:
            before, name = access.halves(weight)
            entries.append(f'**{{f"{before}{{e}}.{name}": part for e, part in zip(self.members(module), {variable})}}')
        else:
            entries.append(f'"{access.local(weight.name)}": {variable}')
    return [*code, "return {", *(f"    {entry}," for entry in entries), "}"]


def _joined(weight: Weight, found: Explanation) -> str:
    bias = "_bias" if weight.role.endswith("bias") else ""
    code = f"weights.{weight.role.replace(' ', '_')}"
    if weight.role.startswith("gate and up"):
        order = ("up", "gate") if found.order.startswith("up first") else ("gate", "up")
        both = ", ".join(f"weights.{name}{bias}" for name in order)
        code = (
            f"torch.stack([{both}], dim=2).flatten(1, 2)"
            if "interleaved" in found.order
            else f"torch.cat([{both}], dim=1)"
        )
    steps: list[tuple[bool, Callable[[str], str]]] = [
        (weight.transposed, lambda code: f"{code}.transpose(1, 2)"),
        (weight.dim > 0, lambda code: f"{code}.movedim(0, {weight.dim})"),
        (weight.each > 1, lambda code: f"{code}.flatten({weight.dim}, {weight.dim + 1})"),
    ]
    for applies, step in steps:
        code = step(code) if applies else code
    return code + (".contiguous()" if weight.transposed or weight.dim else "")


def _activation(found: Explanation, owner: nn.Module) -> str:
    """A child without parameters is taken for the activation: the experiment does not tell which one it is."""
    names = [path for path, child in owner.named_modules() if path and _is_plain(child)]
    shape = "up" if found.order == "no gate" else "gate"
    times = "" if found.order == "no gate" else " * up"
    function = f'module.get_submodule("{names[0]}")' if names else "nn.functional.silu"
    return f"return {function}({shape}){times}  # CHECK: the activation was not looked for"


def _calls_one_by_one(block: nn.Module, owner: nn.Module, found: Explanation) -> bool:
    """Whether the block calls experts that are modules of their own: nothing around them can be called."""
    called = type(owner).forward is not nn.Module.forward
    return any(weight.stacked for weight in found.weights) and (owner is block or not called)


def _declarations(found: Explanation, access: _Access, one_by_one: bool) -> list[str]:
    """Class attributes for experts that are modules of their own."""
    lists = sorted({access.halves(weight)[0].removesuffix(".") for weight in found.weights if weight.stacked})
    code = [f'expert_modules = "{lists[0]}"'] if lists else []
    if one_by_one and found.router is not None and "." in found.router:
        code.append(f'router = "{found.router.rpartition(".")[0]}"')
    elif one_by_one:
        code.append('router = ""  # CHECK: no module with the router was found; without one, write `listen`')
    return ["", *code, ""] if code else [""]


def _top_k(block: nn.Module, found: Explanation) -> str:
    """An attribute with that value: of the block, its router or their config."""
    router = found.router.rpartition(".")[0] if found.router else ""
    for path, module in {"block": block, f"block.{router}".rstrip("."): block.get_submodule(router)}.items():
        for name, number in vars(module).items():
            if type(number) is int and number == found.top_k:
                return f"{path}.{name}"
    return str(found.top_k)


def _is_plain(module: nn.Module) -> bool:
    """Whether it may be an activation function: no children, no parameters, no dropout."""
    inside = [*module.children(), *module.parameters()]
    return not inside and not isinstance(module, nn.Dropout | nn.Identity)


def _indented(code: list[str], spaces: int = 8) -> str:
    return "\n".join(f"{' ' * spaces}{line}".rstrip() for line in code)
