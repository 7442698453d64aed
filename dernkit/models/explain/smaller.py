"""A config with fewer and narrower experts, so that one block of a model of any size can be run."""

from __future__ import annotations

import copy
import re
from typing import Any

from torch import nn

from dernkit.models.probe import Field, build_on_meta, get_field, integer_fields, set_field

_LARGEST = 2**24
_FEWEST = 16
_SHARE = 0.7


def smaller_config(model_class: type[nn.Module], config: Any) -> Any:
    """Halve the fields that the size of the largest stack of matrices hangs on until it is small enough to be run.

    Layers, embeddings and all that a layer is called with keep their shapes. Nothing is halved in a small model.
    """
    config = copy.deepcopy(config)
    model = build_on_meta(model_class, config)
    fields = integer_fields(config)
    while largest_stack(model) > _LARGEST:
        tried = {field: _halved(model_class, config, field, model) for field in fields}
        useful = {field: small for field, small in tried.items() if small is not None}
        if not useful:
            break
        fields = list(useful)
        field = max(fields, key=lambda field: get_field(config, field))
        set_field(config, field, get_field(config, field) // 2)
        model = useful[field]
    return config


def largest_stack(model: nn.Module) -> int:
    """Numbers in a layer's largest 3-D parameter or set of like-named matrices; in its largest matrix without such."""
    stacks: dict[str, int] = {}
    matrices: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        layer, rest = re.match(r"(\D*\d+)?(.*)", name).groups()  # type: ignore[union-attr]
        into = stacks if parameter.ndim > 2 or (layer and re.search(r"\d", rest)) else matrices
        key = f"{layer}" + re.sub(r"\d+", "*", rest)
        into[key] = into.get(key, 0) + (parameter.numel() if layer else 0)
    return max((stacks or matrices).values(), default=0)


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
    return small if largest_stack(small) <= _SHARE * largest_stack(model) and _alike(model, small) else None


def _alike(model: nn.Module, small: nn.Module) -> bool:
    """Whether only the insides of layers differ."""
    outside = (
        [(name, p.shape) for name, p in m.named_parameters() if not re.search(r"\.\d+\.", name)] for m in (model, small)
    )
    layers = ({path for path, _ in m.named_modules() if re.fullmatch(r"\D*\d+", path)} for m in (model, small))
    return len({str(shapes) for shapes in outside}) == 1 and len({str(sorted(paths)) for paths in layers}) == 1
