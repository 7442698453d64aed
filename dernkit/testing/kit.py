"""The conformance kit: the laws that a component keeps, as tests for pytest or for `dernkit check`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dernkit.components import KINDS
from dernkit.errors import PluginError
from dernkit.sentences import did_you_mean
from dernkit.testing.law import Check, kind_of, label
from dernkit.testing.laws import (
    assigners,
    budgets,
    merges,
    observing,
    others,
    refits,
    routers,
    scorers,
    selectors,
    similarities,
)
from dernkit.testing.laws.common import common_laws
from dernkit.testing.trials import LAYER_KINDS

Expected = Mapping[str, Mapping[str, str]]
"""Class name, or class name with options as in test ids -> id of a law -> why the component breaks it."""

_MODULES = (scorers, budgets, selectors, assigners, similarities, merges, routers, refits, others, observing)


def all_checks() -> list[Check]:
    """Every law of every kind, by kind; those that all kinds share come first."""
    own = [check for module in _MODULES for check in module.laws()]
    shared = [check for kind in LAYER_KINDS for check in common_laws(kind)]
    return sorted([*shared, *own], key=lambda check: list(KINDS).index(check.kind))


def checks_of(component: Any) -> list[Check]:
    """The laws that say something about a component.

    Raises:
        PluginError: it is not an instance with the methods of one kind.
    """
    kind = kind_of(component)
    return [check for check in all_checks() if check.kind == kind and check.only_if(component)]


def parametrize_with_checks(
    components: Iterable[Any], *, expected_failures: Expected | None = None
) -> Callable[[Any], Any]:
    """A decorator that runs a test ``(component, check)`` for every law of every component; call ``check(component)``.

    Args:
        components: instances; their options are part of the test's id where they are not at their defaults.
        expected_failures: laws that a component breaks on purpose, each with its reason. Strict: if the component
            keeps such a law, the test fails.

    Raises:
        PluginError: pytest is missing, something is not a component, or an expected failure names none of the tests.
    """
    try:
        import pytest
    except ImportError:
        raise PluginError(
            "dernkit.testing: parametrize_with_checks must have pytest. Got an environment without it instead. "
            "Install it with: pip install pytest"
        ) from None
    given = list(components)
    expected = expected_failures or {}
    check_expected(given, expected)
    parameters = []
    for component in given:
        for check in checks_of(component):
            why = why_expected(component, check, expected)
            marks = [] if why is None else [pytest.mark.xfail(reason=why, strict=True)]
            parameters.append(pytest.param(component, check, id=f"{label(component)}-{check.id}", marks=marks))
    return pytest.mark.parametrize(("component", "check"), parameters)


def why_expected(component: Any, check: Check, expected: Expected) -> str | None:
    """Why the component is expected to break this law; None when it is expected to keep it."""
    for name in (label(component), type(component).__name__):
        if check.id in expected.get(name, {}):
            return expected[name][check.id]
    return None


def check_expected(components: Iterable[Any], expected: Expected) -> None:
    """Raises PluginError when an expected failure is of no given component, of no law, or without a reason."""
    known: dict[str, set[str]] = {}
    for component in components:
        ids = {check.id for check in checks_of(component)}
        for name in (label(component), type(component).__name__):
            known[name] = known.get(name, set()) | ids
    for name, laws in expected.items():
        if name not in known:
            raise _unknown("a component that is given", name, known)
        for law, why in laws.items():
            if law not in known[name]:
                raise _unknown(f"a law of {name}", law, known[name])
            if not why:
                raise PluginError(f"expected failures of {name}: {law} must have a reason. Got none instead. Give one.")


def _unknown(what: str, name: str, known: Iterable[str]) -> PluginError:
    hint = did_you_mean(name, known) or f"Known: {', '.join(sorted(known)) or 'none'}."
    return PluginError(f"expected failures: must name {what}. Got '{name}' instead. {hint}")


def has_defaults(cls: type) -> bool:
    """Whether a class can be instantiated without options."""
    return all(
        field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        for field in dataclasses.fields(cls)
    )
