"""Seeing what a call changes: bits of everything that goes in and comes out, and the global random states."""

from __future__ import annotations

import dataclasses
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor

Leaf = Tensor | int | float | str | bool | None


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Leaf]]:
    """Every tensor and every plain value in a record, mapping, sequence or model, with its place; no functions."""
    if isinstance(value, torch.nn.Module):
        value = {"training": value.training, **value.state_dict()}
    if isinstance(value, torch.Generator):
        return
    if value is None or isinstance(value, Tensor | int | float | str | bool):
        yield path, value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}".lstrip("."))
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from leaves(entry, f"{path}[{key!r}]")
    elif isinstance(value, list | tuple):
        for number, entry in enumerate(value):
            yield from leaves(entry, f"{path}[{number}]" if path else str(number))


def snapshot(value: Any) -> dict[str, Leaf]:
    """Copies of all leaves."""
    return {path: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for path, leaf in leaves(value)}


def first_difference(before: Mapping[str, Leaf], after: Mapping[str, Leaf]) -> str | None:
    """The place of the first leaf that has other bits, another type or shape, or is gone; None when all are equal."""
    for path in [*before, *(path for path in after if path not in before)]:
        if path not in before or path not in after or not _same(before[path], after[path]):
            return path or "the value"
    return None


def _same(one: Leaf, other: Leaf) -> bool:
    if not isinstance(one, Tensor) or not isinstance(other, Tensor):
        return type(one) is type(other) and repr(one) == repr(other)
    if one.dtype != other.dtype or one.shape != other.shape:
        return False
    return torch.equal(_bits(one), _bits(other))


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The global generators of torch, numpy and Python begin at ``seed``; afterwards they are where they were."""
    states = torch.random.get_rng_state(), numpy.random.get_state(), random.getstate()
    torch.random.default_generator.manual_seed(seed)
    numpy.random.seed(seed % 2**32)
    random.seed(seed)
    try:
        yield
    finally:
        torch.random.set_rng_state(states[0])
        numpy.random.set_state(states[1])
        random.setstate(states[2])


def random_states() -> dict[str, Any]:
    """Where the global generators are, comparable.

    Python's is left out where beartype is loaded, which draws from it at every call that it checks.
    """
    states: dict[str, Any] = {
        "torch": torch.random.get_rng_state().tolist(),
        "numpy": [part.tolist() if hasattr(part, "tolist") else part for part in numpy.random.get_state()],
    }
    return states if "beartype" in sys.modules else {**states, "random": random.getstate()}
