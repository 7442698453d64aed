"""A second device that computes on the CPU, for tests of where tensors lie: a GPU's rules where there is no GPU.

Tensors on it carry an ordinary one. As on a GPU, an operation on tensors of two devices fails (but for CPU scalars, and
CPU indices), a generator of the CPU is not taken, tensors are no NumPy arrays, and matrices of integers are not
multiplied. What it computes is what the CPU computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils import backend_registration

NAME = "simulated"
_INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
_MOVING = {"_to_copy", "copy_"}
_MAKING = {"empty", "empty_like", "empty_strided", "detach", "zeros", "arange"}
_PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "addr", "addr_"}


class Second(torch.Tensor):
    """A tensor of the second device."""

    raw: torch.Tensor

    @staticmethod
    def __new__(cls, raw: torch.Tensor) -> Second:
        how: Any = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "dtype": raw.dtype}
        made = torch.Tensor._make_wrapper_subclass(cls, raw.shape, device=torch.device(NAME, 0), **how)  # type: ignore[attr-defined]
        made.raw = raw
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Second({self.raw!r})"

    def tolist(self) -> Any:
        return self.raw.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


_computed = 0
"""Operations so far, but for copies."""


@contextmanager
def in_use() -> Iterator[None]:
    """What is computed inside must be computed there, at least in part."""
    before = _computed
    yield
    assert _computed > before, "nothing was computed on the second device"


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    global _computed
    name = func.overloadpacket.__name__
    flat, spec = pytree.tree_flatten((args, kwargs))
    if name not in _MOVING:
        _refuse(name, args, kwargs, flat)
        _computed += name not in _MAKING
    there = {id(value.raw): value for value in flat if isinstance(value, Second)}
    given, named = pytree.tree_unflatten([_raw(value) for value in flat], spec)
    if name == "histc" and not given[0].is_floating_point():  # a GPU's counts integers, the CPU's does not
        found = func(given[0].double(), *given[1:], **named).to(given[0].dtype)
    else:
        found = func(*given, **named)
    leaves = kwargs.get("device") is not None and kwargs["device"].type != NAME
    if leaves or (name == "copy_" and not isinstance(args[0], Second)):
        return found
    return pytree.tree_map_only(
        torch.Tensor, lambda value: there[id(value)] if id(value) in there else Second(value), found
    )


def _raw(value: Any) -> Any:
    if isinstance(value, torch.device) and value.type == NAME:
        return torch.device("cpu")
    return value.raw if isinstance(value, Second) else value


def _refuse(name: str, args: Any, kwargs: Any, flat: list[Any]) -> None:
    """What a GPU refuses."""
    given = [value for value in flat if isinstance(value, torch.Tensor)]
    if name in _INDEXING:
        given = [args[0], *args[2:3]]
    if any(not isinstance(value, Second) and value.ndim for value in given):
        raise RuntimeError(f"{name}: expected all tensors to be on the same device, but found two, cpu and {NAME}")
    if any(isinstance(value, torch.Generator) for value in flat):
        raise RuntimeError(f"{name}: expected a {NAME} device type for generator but found cpu")
    if name in _PRODUCTS and not all(value.is_floating_point() for value in given):
        raise NotImplementedError(f"{name}: not implemented for integers")


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """Nobody is to choose the device who was not told to."""

    def is_available(self) -> bool:
        return False

    def is_built(self) -> bool:
        return True

    def has_primary_context(self, number: int) -> bool:
        return True


def _kernel(name: str) -> Callable[..., Any]:
    packet, _, overload = name.partition(".")
    func = getattr(getattr(torch.ops.aten, packet), overload or "default")
    return lambda *args, **kwargs: _run(func, args, kwargs)


def _register() -> Any:
    """The device, for the whole process: torch has room for one such."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, hook=_Hooks())
    others, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    others.fallback(lambda func, *args, **kwargs: _run(func, args, kwargs), "PrivateUse1")
    # torch would make the first ones empty and let them grow, and calls the last one past its dispatcher.
    for name in ("arange", "arange.start", "arange.start_step", "_to_copy"):
        aten.impl(name, _kernel(name), "PrivateUse1")
    return others, aten


_LIBRARIES = _register()
"""Registrations last as long as these."""
SECOND = torch.device(NAME, 0)
