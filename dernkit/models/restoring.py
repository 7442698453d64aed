"""Surgery for a while: a model that is put back as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dernkit.api import Block, CompressedLayer
from dernkit.models.probe import get_field, set_field

_CONTENTS = ("_parameters", "_buffers", "_modules")


@contextmanager
def compressed(model: Any, block: Block, layer: CompressedLayer) -> Iterator[None]:
    """The block, and the config fields that say its sizes, as they are after surgery; no tensor of it is copied."""
    fields = block.config_changes(len(layer.router), layer.up.shape[1])
    before = {field: get_field(model.config, field) for field in fields}
    with _restored(model):
        try:
            for field, value in fields.items():
                set_field(model.config, field, value)
            # A copy of the block: surgery changes the sizes that it remembers.
            _replace(model.get_submodule(block.path), copy.copy(block), layer)
            yield
        finally:
            for field, value in before.items():
                set_field(model.config, field, value)


def _replace(module: nn.Module, block: Block, layer: CompressedLayer) -> None:
    """Surgery; a parameter that keeps its bits keeps its memory too, as kernels round differently at other places."""
    before = dict(module.named_parameters())
    block.replace(layer)
    for name, parameter in list(module.named_parameters()):
        old = before.get(name)
        if old is not None and old.shape == parameter.shape and torch.equal(old, parameter):
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._parameters[leaf] = old


@contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Parameters, buffers, modules and all other attributes, put back in the end.

    Dicts stay the same objects: handles of hooks refer to them.
    """
    before = [
        (module, dict(vars(module)), {name: dict(vars(module)[name]) for name in _CONTENTS})
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, contents in before:
            vars(module).update(attributes)
            for name, content in contents.items():
                vars(module)[name].clear()
                vars(module)[name].update(content)
