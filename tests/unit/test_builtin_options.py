"""Every option of every built-in component is bounded, has a default and is documented."""

import ast
import inspect
from dataclasses import MISSING, fields
from itertools import pairwise
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
from annotated_types import Interval

from dernkit.components import KINDS, PROTOCOLS
from dernkit.registry import Registry

BUILTIN = Registry.load(entry_points=False)
COMPONENTS = [c.cls for kind in KINDS.values() if kind.reads_statistics for c in BUILTIN.components(kind.name)]
"""All that decides: scorers, similarities, merges and so on."""


def is_bounded(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        base, *notes = get_args(hint)
        return is_bounded(base) or any(isinstance(note, Interval) for note in notes)
    inner = [arg for arg in get_args(hint) if arg is not type(None) and arg is not Ellipsis]
    if get_origin(hint) is tuple and inner == [str]:
        return True
    return hint in (bool, *PROTOCOLS) or get_origin(hint) is Literal or (bool(inner) and all(map(is_bounded, inner)))


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_options_are_bounded_and_have_defaults(component: type) -> None:
    hints = get_type_hints(component, include_extras=True)
    for option in fields(component):
        assert is_bounded(hints[option.name]), option.name
        assert option.default is not MISSING or option.default_factory is not MISSING
    assert hash(component()) == hash(component()) and component() == component()


@pytest.mark.parametrize("component", COMPONENTS, ids=lambda component: component.name)
def test_options_and_components_are_documented(component: type) -> None:
    body = ast.parse(inspect.getsource(component)).body[0].body
    documented = {
        line.target.id
        for line, after in pairwise(body)
        if isinstance(line, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
    }
    assert component.__doc__ and {option.name for option in fields(component)} <= documented
