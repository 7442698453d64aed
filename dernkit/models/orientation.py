"""Matrices that a checkpoint may hold either way round.

For some families transformers reads experts in two layouts, the published one and its transpose, and tells them apart
by shape alone (``Transpose(check_dims=True)``). The way back has no shape to go by: there, what was read decides.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor
from transformers.core_model_loading import Transpose, WeightConverter

from dernkit.errors import CheckpointError

Shapes = Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]]
"""Name on disk -> shape on disk and in memory."""


def settled(conversions: Sequence[Any], shapes: Shapes) -> tuple[list[Any], list[str]]:
    """The conversions with every one that looks at shapes doing what it did for this checkpoint, whatever the shape.

    Returns:
        the conversions, and the patterns of the names on disk that hold transposed matrices.
    """
    kept: list[Any] = []
    patterns: list[str] = []
    for conversion in conversions:
        if not _looks_at_shapes(conversion):
            kept.append(conversion)
        elif _turns(conversion, shapes):
            kept.append(_without_a_look(conversion))
            patterns += conversion.source_patterns
    return kept, patterns


def _looks_at_shapes(conversion: Any) -> bool:
    return isinstance(conversion, WeightConverter) and all(
        isinstance(operation, Transpose) and operation.check_dims for operation in conversion.operations
    )


def _turns(conversion: Any, shapes: Shapes) -> bool:
    names = [name for name in shapes if _matches(name, conversion.source_patterns)]
    return any(shapes[name][0] != shapes[name][1] for name in names)


def _without_a_look(conversion: Any) -> Any:
    fixed = copy.deepcopy(conversion)
    for operation in fixed.operations:
        operation.check_dims = False
    return fixed


def refuse_square(patterns: Sequence[str], disk: Mapping[str, Tensor]) -> None:
    """Refuse to write what transformers would take for the other layout.

    Raises:
        CheckpointError: a transposed matrix has the same shape as its transpose.
    """
    for name, tensor in disk.items():
        if _matches(name, patterns) and tensor.shape[-1] == tensor.shape[-2]:
            raise CheckpointError(
                f"{name}: must not be square, since transformers tells the two layouts of this family by their shapes. "
                f"Got {list(tensor.shape)} instead. Choose another expert width."
            )


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)
