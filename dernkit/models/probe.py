"""What follows a config field, found by building the model twice on the meta device and comparing.

No table of families: a field is the expert count if doubling it doubles the experts; a tensor follows the expert count
if its shape changes with that field.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from torch.overrides import TorchFunctionMode

from dernkit.errors import CheckpointError

Field = tuple[str, ...]
"""Path of a config field from the root config: ``("text_config", "num_experts")``."""


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules built inside get parameters of ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _EmptyOnMeta(TorchFunctionMode):
    """``torch.empty``, and stacks of matrices of ``torch.zeros``, without a device allocate nothing.

    `init_empty_weights` moves a parameter to the meta device after it was made: before that, the experts of one
    DeepSeek-V3 layer would take 30 GB. Buffers are computed (``arange``, ``zeros`` of one or two dimensions), not left
    empty, and stay real.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if kwargs.get("device") is None and (func is torch.empty or (func in _FILLED and _is_stack(args, kwargs))):
            kwargs = {**kwargs, "device": "meta"}
        return func(*args, **kwargs)


_FILLED = (torch.zeros, torch.ones)


def _is_stack(args: Any, kwargs: Any) -> bool:
    size = kwargs.get("size", args[0] if args and not isinstance(args[0], int) else args)
    return len(size) > 2


def build_on_meta(model_class: type[nn.Module], config: Any, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The model with parameters on the meta device, never allocated; buffers (rotary frequencies) are real."""
    with (
        init_empty_weights(include_buffers=False),
        _EmptyOnMeta(),
        default_dtype(dtype),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        return model_class(copy.deepcopy(config)).eval()


@dataclass(frozen=True, slots=True)
class Probe:
    """What changes in a model when one config field is doubled."""

    field: Field
    value: int
    tensors: dict[str, dict[int, int]]
    """In-memory name -> dimensions that changed, and by how much each grew."""
    attributes: dict[str, dict[str, int]]
    """Module path -> integer attributes that changed, and by how much each grew."""

    def scaled(self, size: int, growth: int, new: int) -> int:
        """What is ``size`` and grew by ``growth``, when the field is set to ``new`` (sizes are linear in the field)."""
        steps = growth * (new - self.value)
        if steps % self.value:
            raise CheckpointError(
                f"'{'.'.join(self.field)}': sizes must be whole numbers at {new}. Got {size} + {steps}/{self.value} "
                f"instead. Take a count that divides."
            )
        return size + steps // self.value


def get_field(config: Any, field: Field) -> Any:
    """The value at a config path."""
    for name in field:
        config = getattr(config, name)
    return config


def set_field(config: Any, field: Field, value: int) -> None:
    """Set the value at a config path, in place."""
    setattr(get_field(config, field[:-1]), field[-1], value)


def candidate_fields(config: Any, value: int) -> list[Field]:
    """All integer config fields that have ``value``, nested configs included, in the config's order."""
    return [path for path, found in _walk(config.to_dict(), ()) if found == value and type(found) is int]


def counting_fields(config: Any, names: Collection[str]) -> list[Field]:
    """All config fields called one of ``names`` that hold a number above 0, nested configs included."""
    return [path for path, found in _walk(config.to_dict(), ()) if path[-1] in names and type(found) is int and found]


def integer_fields(config: Any) -> list[Field]:
    """All integer config fields, nested configs included, in the config's order."""
    return [path for path, found in _walk(config.to_dict(), ()) if type(found) is int]


def _walk(node: dict[str, Any], path: Field) -> Iterator[tuple[Field, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _walk(value, (*path, key))
        else:
            yield (*path, key), value


def probe_field(
    model: Any, value: int, changed: Callable[[Any, Any], bool], what: str, lists: Collection[str] = ()
) -> Probe:
    """Find the config field with ``value`` whose doubling makes ``changed(model, doubled)`` true, and what follows it.

    Args:
        lists: paths of modules that may have more children in the doubled build: one for each expert.

    Raises:
        CheckpointError: no field, or more than one, does.
    """
    doubles = ((field, doubled(model, field, value)) for field in candidate_fields(model.config, value))
    found = [(field, other) for field, other in doubles if other is not None and changed(model, other)]
    if len(found) != 1:
        names = ", ".join(".".join(field) for field, _ in found) or "none"
        raise CheckpointError(
            f"{model.config.model_type}: exactly one config field must set the {what} ({value}). "
            f"Got {names} instead. This family needs an adapter plugin."
        )
    field, other = found[0]
    return compared(model, other, field, value, lists)


def doubled(model: Any, field: Field, value: int) -> Any | None:
    """The model with twice the value in ``field``; None where the config refuses it: then it is not a free size."""
    config = copy.deepcopy(model.config)
    try:
        set_field(config, field, 2 * value)
        return build_on_meta(type(model), config)
    except Exception:  # of any kind: a config may validate the field against others
        return None


def compared(model: Any, other: Any, field: Field, value: int, lists: Collection[str] = ()) -> Probe:
    """What grew from ``model`` to ``other``, in which ``field`` is doubled; ``lists`` as for `probe_field`.

    Raises:
        CheckpointError: something exists in one build only, outside of the ``lists``.
    """
    _refuse_more(model, _tensors(model), _tensors(other), lists)
    _refuse_more(model, _modules(model), _modules(other), lists)
    return Probe(field, value, _grown_tensors(model, other), _grown_attributes(model, other))


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Tied tensors under each of their names: a live model ties them, a meta build does not."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _modules(model: nn.Module) -> dict[str, nn.Module]:
    """Shared modules under each of their names."""
    return dict(model.named_modules(remove_duplicate=False))


def _refuse_more(model: Any, before: Collection[str], after: Collection[str], lists: Collection[str]) -> None:
    inside = tuple(f"{path}." for path in lists)
    more = [name for name in after if name not in before and not name.startswith(inside)]
    if extra := sorted({*(name for name in before if name not in after), *more}):
        raise CheckpointError(
            f"{model.config.model_type}: the same tensors and modules must exist at every expert count and width. "
            f"Got '{extra[0]}' in one build only instead. This family needs an adapter plugin."
        )


def _grown_tensors(model: nn.Module, other: nn.Module) -> dict[str, dict[int, int]]:
    after = _tensors(other)
    grown = {}
    for name, tensor in _tensors(model).items():
        sizes = enumerate(zip(tensor.shape, after[name].shape, strict=True))
        if dims := {dim: b - a for dim, (a, b) in sizes if a != b}:
            grown[name] = dims
    return grown


def _grown_attributes(model: nn.Module, other: nn.Module) -> dict[str, dict[str, int]]:
    grown: dict[str, dict[str, int]] = {}
    twins = _modules(other)
    for path, module in model.named_modules():
        twin = twins[path]
        found = {
            name: vars(twin)[name] - value
            for name, value in vars(module).items()
            if type(value) is int and type(vars(twin).get(name)) is int and vars(twin)[name] != value
        }
        if found:
            grown[path] = found
    return grown
