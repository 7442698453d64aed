"""A config with fewer and narrower experts, so that one block of a model of any size can be run."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

from dernkit.models.probe import Field, build_on_meta, get_field, integer_fields, set_field

_LARGEST = 2**26
_FEWEST = 16
_SHARE = 0.7


def smaller_config(model_class: type[nn.Module], config: Any) -> Any:
    """Halve the fields that most of a decoder layer's size hangs on until its modules are small enough to be run.

    Layers, embeddings and all that a layer is called with keep their shapes. Nothing is halved in a small model.
    """
    config = copy.deepcopy(config)
    model = build_on_meta(model_class, config)
    fields: list[Field] | None = None
    while largest_layer(model) > _LARGEST:
        tried = {field: _halved(model_class, config, field, model) for field in fields or integer_fields(config)}
        useful = {field: small for field, small in tried.items() if small is not None}
        if not useful:
            break
        fields = list(useful)
        field = min(fields, key=lambda field: largest_layer(useful[field]))
        set_field(config, field, get_field(config, field) // 2)
        model = useful[field]
    return config


def largest_layer(model: nn.Module) -> int:
    """Parameters of the largest module that is one of a numbered list."""
    layers = [module for path, module in model.named_modules() if re.search(r"(^|\.)\d+$", path)]
    return max((sum(tensor.numel() for tensor in layer.parameters()) for layer in layers), default=0)


def _halved(model_class: type[nn.Module], config: Any, field: Field, model: nn.Module) -> nn.Module | None:
    config = copy.deepcopy(config)
    try:
        value = get_field(config, field)
        if value < 2 * _FEWEST or value % 2:
            return None
        set_field(config, field, value // 2)
        small = build_on_meta(model_class, config)
    except Exception:  # a field of a plain dictionary; a config may validate fields against each other
        return None
    return small if largest_layer(small) <= _SHARE * largest_layer(model) and _alike(model, small) else None


def _alike(model: nn.Module, small: nn.Module) -> bool:
    """Whether only the insides of layers differ."""
    depth, other = (sum(1 for path, _ in m.named_modules() if re.search(r"^\D*\.?\d+$", path)) for m in (model, small))
    shapes, others = ([p.shape for n, p in m.named_parameters() if not re.search(r"\.\d+\.", n)] for m in (model, small))
    return depth == other and shapes == others
