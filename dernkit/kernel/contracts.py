"""What every call of a component is held to: laws with ids, and a sentence that says who broke which.

Whether an input was changed is seen without copying weights: torch counts in-place operations per tensor (its views
count with it), and up to ``SEEN`` entries of each are compared, all of a small one. What goes past torch's counter
(numpy, ``.data``) and misses those entries of a larger tensor is not seen.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dernkit.errors import CheckpointError, ContractError, DernkitError
from dernkit.types import LayerStats

LAWS: Mapping[str, str] = {
    "no_exception": "raises nothing but a DernkitError",
    "no_mutation": "does not change its inputs",
    "only_declared_statistics": "reads no statistic that its `requires` does not name",
    "type": "returns what its protocol says: tensors, not arrays, lists or None",
    "shape": "returns tensors of the shape that its protocol says",
    "dtype": "returns tensors of the dtype that its protocol says",
    "finite": "returns finite numbers, also for an expert that saw no token",
    "in_range": "returns numbers of experts, neurons, tokens and layers that exist, and counts that are allowed",
    "keeps_scores": "hands on the scores that it was given",
    "groups_as_said": "groups experts if and only if its `groups` is true",
    "own_group": "groups every kept expert with itself",
}
"""Laws that hold at every call, by the id that errors and the conformance kit name."""

_ALWAYS = ("no_exception", "no_mutation", "type")
_READING = (*_ALWAYS, "only_declared_statistics")
_TENSORS = (*_READING, "shape", "dtype", "finite")

LAWS_OF: Mapping[str, tuple[str, ...]] = {
    "scorer": _TENSORS,
    "budget": (*_READING, "finite", "in_range"),
    "selector": (*_READING, "shape", "dtype", "in_range", "keeps_scores", "groups_as_said", "own_group"),
    "assigner": (*_TENSORS, "in_range"),
    "similarity": (*_TENSORS, "in_range"),
    "merge": _TENSORS,
    "router": _TENSORS,
    "refit": _TENSORS,
    "source": (*_ALWAYS, "shape", "dtype"),
    "evaluator": _ALWAYS,
    "report": _ALWAYS,
    "adapter": ("no_exception",),
}
"""Kind -> the laws that its components are held to. What an adapter returns is held against the model's own forward."""

_READERS = ("source", "evaluator")
"""Kinds that read files: what the disk does is not their fault."""

SEEN = 1024
"""Entries of a tensor that are compared after a call."""

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Call:
    """A component that is about to be called, and for which layer."""

    kind: str
    component: Any
    layer: int | None = None

    @property
    def where(self) -> str:
        """Kind, name and layer in words."""
        layer = "" if self.layer is None else f", layer {self.layer}"
        return f"{self.kind} '{self.component.name}'{layer}"

    def __call__(self, method: str, **inputs: Any) -> Any:
        """What the method returns, unchecked.

        Raises:
            ContractError: it raised what it must not, or changed an input.
            DernkitError: the component's own.
        """
        before = list(_leaves("", inputs))
        try:
            result = getattr(self.component, method)(*inputs.values())
        except ContractError as error:
            if error.kind:
                raise
            raise error.by(f"{self.where}: ", self.kind, self.component.name, self.layer) from error
        except (DernkitError, torch.OutOfMemoryError):
            raise
        except (Exception, SystemExit) as error:
            if isinstance(error, OSError) and self.kind in _READERS:
                raise
            said = f"{type(error).__name__}: {error}".rstrip(".: ")
            got = f"{' '.join(said.split())[:240]}{_place(error, type(self.component).__module__)}"
            raise self.broken("no_exception", f"{method} must raise nothing but a DernkitError", got) from error
        after = {leaf.path: leaf for leaf in _leaves("", inputs)}
        changed = [leaf.path for leaf in before if not leaf.same(after.pop(leaf.path, None))] + list(after)
        if changed:
            raise self.broken("no_mutation", f"{method} must not change its input", f"'{changed[0]}' changed")
        return result

    def broken(self, law: str, must: str, got: str, fix: str = "Fix the plugin.") -> ContractError:
        """The error that says which law the component broke, and how."""
        sentence = f": {must} (law {law}). Got {got} instead. {fix}"
        return ContractError(sentence, law=law).by(self.where, self.kind, self.component.name, self.layer)

    def seen(self, stats: LayerStats) -> LayerStats:
        """The statistics that the component and those that it holds declare, and no others.

        Raises:
            CheckpointError: some of them were not collected.
        """
        requires = _requires(self.component)
        if missing := sorted(requires - stats.values.keys()):
            there = ", ".join(sorted(stats.values)) or "none"
            raise CheckpointError(
                f"{self.where}: statistics must hold {', '.join(missing)}, which it requires. Got {there} instead. "
                "Collect them with the recipe that names it: dernkit run RECIPE --model MODEL --out OUT."
            )
        return stats.only(requires)

    def instance(self, value: Any, what: str, cls: Any) -> Any:
        """The value, which must be of that class."""
        if not isinstance(value, cls):
            article = "an" if cls.__name__[0] in "AEIOU" else "a"
            raise self.broken("type", f"{what} must be {article} {cls.__name__}", described(value))
        return value

    def tensor(self, value: Any, what: str, shape: tuple[int, ...] | None, *dtypes: torch.dtype) -> Tensor:
        """The value, which must be a tensor of that shape (None: any) and of one of those dtypes."""
        names = "floating" if dtypes == FLOATING else " or ".join(map(_name, dtypes))
        of_shape = "" if shape is None else f" of shape {list(shape)}"
        must = f"{what} must be a {names} tensor{of_shape}".replace("a int", "an int")
        if not isinstance(value, Tensor):
            raise self.broken("type", must, described(value))
        if value.dtype not in dtypes:
            raise self.broken("dtype", must, described(value))
        if shape is not None and value.shape != shape:
            raise self.broken("shape", must, described(value))
        return value

    def finite(self, value: Tensor, what: str, fix: str = "Divide by no count, weight or norm of 0.") -> Tensor:
        """The value, in which every number must be finite."""
        if not bool(value.isfinite().all()):
            place = (~value.isfinite()).nonzero()[0].tolist()
            got = f"{value[tuple(place)].item()} at {place}"
            raise self.broken("finite", f"{what} must be finite, also for an expert that saw no token", got, fix)
        return value

    def each(self, value: Tensor, legal: Tensor, what: str, rule: str) -> None:
        """Every entry of an index must be legal."""
        if not bool(legal.all()):
            place = (~legal).nonzero()[0].tolist()
            raise self.broken("in_range", f"{what} must be {rule}", f"{value[tuple(place)].item()} at {place}")


def _requires(component: Any) -> frozenset[str]:
    """As the registry has it, so that calibration collects what is asked for here."""
    held = (getattr(component, name) for name in getattr(component, "__dataclass_fields__", ()))
    return component.requires.union(*(_requires(part) for part in held if hasattr(part, "requires")))


def described(value: Any) -> str:
    """What a component returned, in words."""
    if value is None:
        return "nothing"
    if isinstance(value, Tensor):
        return f"{_name(value.dtype)} {list(value.shape)} on {value.device.type}"
    cls = type(value)
    return f"a {cls.__name__}" if cls.__module__ == "builtins" else f"a {cls.__module__.split('.')[0]} {cls.__name__}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _place(error: BaseException, module: str) -> str:
    """The file and line of the component's package where an exception was raised, or passed through last."""
    package, trace, place = module.split(".")[0], error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_globals.get("__name__", "").split(".")[0] == package:
            file = re.split(r"[/\\]", trace.tb_frame.f_code.co_filename)[-1]
            place = f" at {file}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


@dataclass(frozen=True, slots=True, eq=False)
class _Leaf:
    """One value of the inputs, and what a tensor of them was like."""

    path: str
    value: Any
    layout: tuple[Any, ...] = ()
    entries: Tensor | None = None

    def same(self, later: _Leaf | None) -> bool:
        if later is None or self.value is not later.value or self.layout != later.layout:
            return False
        if self.entries is None or later.entries is None:
            return True
        return torch.equal(self.entries, later.entries)


def _leaves(path: str, value: Any) -> Iterator[_Leaf]:
    """Everything that an input holds, by its path: `stats.gate_sum`."""
    if isinstance(value, Tensor):
        yield _tensor_leaf(path, value)
    elif isinstance(value, LayerStats):
        yield from _leaves(path, value.values)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _leaves(f"{path}.{field.name}", getattr(value, field.name))
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from _leaves(f"{path}.{key}" if path else str(key), entry)
    elif isinstance(value, list | tuple):
        for position, entry in enumerate(value):
            yield from _leaves(f"{path}.{position}", entry)
    else:
        yield _Leaf(path, value)


def _tensor_leaf(path: str, tensor: Tensor) -> _Leaf:
    version = None if tensor.is_inference() else tensor._version
    layout = (tuple(tensor.shape), tensor.dtype, tensor.stride(), version)
    return _Leaf(path, tensor, layout, None if tensor.is_meta else _entries(tensor.detach()))


def _entries(tensor: Tensor) -> Tensor:
    """The bytes of all entries, or of some that are spread over the tensor, whatever its strides; no copy of more."""
    count = tensor.numel()
    if count <= SEEN:
        return tensor.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
    # Steps of the golden ratio, odd, so that no dimension of 2^k entries is met in the same column again and again.
    step = int(count * 0.6180339887) | 1
    places = torch.arange(SEEN, device=tensor.device) * step % count
    return tensor[torch.unravel_index(places, tensor.shape)].view(torch.uint8)
