"""The hooks: one per kind, each documented."""

import inspect

import pytest

from dernkit import hookspecs
from dernkit.components import KINDS

HOOKS = {name: hook for name, hook in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("dernkit_")}


def test_every_kind_has_one_hook_and_every_hook_one_kind() -> None:
    assert sorted(HOOKS) == sorted(kind.hook for kind in KINDS.values())


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_hook_says_what_its_classes_must_provide(kind) -> None:
    text = HOOKS[kind.hook].__doc__ or ""
    assert text, f"{kind.hook} has no docstring"
    for method in kind.methods:
        parameters = list(inspect.signature(getattr(kind.protocol, method)).parameters)[1:]
        assert f"``{method}({', '.join(parameters)})``" in text
    for attribute in kind.attributes:
        assert f"``{attribute}``" in text


@pytest.mark.parametrize("hook", HOOKS.values(), ids=HOOKS)
def test_a_hook_takes_nothing_and_returns_classes(hook) -> None:
    assert str(inspect.signature(hook)) == "() -> 'list[type]'"
