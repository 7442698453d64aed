"""The hooks of dernkit: who provides which components. One hook per kind, each returns a list of classes.

A plugin is a module (or object) named by an entry point of the group ``dernkit``; it implements any of these hooks with
``dernkit.api.hookimpl``. The classes are final frozen dataclasses: ``name`` is the recipe's word for the component and
the fields are its options, typed and bounded. What the method must do is written at the protocol in `dernkit.api`.

A hook that is to go stays for one version of the API at least, with what replaces it in its `hook` line: it works as
before, and each implementation is warned of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pluggy

from dernkit.errors import DeprecatedHookWarning

_hookspec = pluggy.HookspecMarker("dernkit")


@dataclass(frozen=True, slots=True)
class Hook:
    """What a specification says besides its name."""

    since: int
    """Version of the plugin API (`dernkit.api.API_VERSION`) that it came with."""
    replaced_by: str = ""
    """The hook that took its place; it returns classes of the same kind."""
    unused: dict[str, Any] = field(default_factory=dict)
    """Arguments that it no longer needs, with what those who still name them are given."""


def hook(since: int, *, replaced_by: str = "", **unused: Any) -> Callable[[Callable[..., list[type]]], Any]:
    """Marks a function as the specification of a hook; see `Hook`."""

    def mark(function: Callable[..., list[type]]) -> Any:
        name = function.__name__
        gone = DeprecatedHookWarning(f"{name} is deprecated: implement {replaced_by} instead") if replaced_by else None
        arguments = {
            argument: DeprecatedHookWarning(f"argument '{argument}' of {name} is deprecated: leave it out")
            for argument in unused
        }
        marked: Any = _hookspec(function, warn_on_impl=gone, warn_on_impl_args=arguments)
        marked.hook = Hook(since, replaced_by, unused)
        return marked

    return mark


@hook(since=1)
def dernkit_scorers() -> list[type]:  # type: ignore[empty-body]
    """Scorers: classes with ``name``, ``requires`` and ``score(bank, stats)``: how much each expert matters."""


@hook(since=1)
def dernkit_budgets() -> list[type]:  # type: ignore[empty-body]
    """Budgets: classes with ``name``, ``requires`` and ``needs_measures``: how many experts each layer keeps.

    Methods: ``measure(bank, scores, stats)`` and ``allocate(measures, keep, limits)``.
    """


@hook(since=1)
def dernkit_selectors() -> list[type]:  # type: ignore[empty-body]
    """Selectors: classes with ``name``, ``requires``, ``groups`` and ``select(bank, scores, count, stats)``."""


@hook(since=1)
def dernkit_assigners() -> list[type]:  # type: ignore[empty-body]
    """Assigners: classes with ``name``, ``requires``, ``needs_groups`` and ``assign(bank, retention, stats)``."""


@hook(since=1)
def dernkit_similarities() -> list[type]:  # type: ignore[empty-body]
    """Similarities: classes with ``name``, ``requires`` and ``match(bank, dropped, kept, stats)``: what fits."""


@hook(since=1)
def dernkit_merges() -> list[type]:  # type: ignore[empty-body]
    """Merges: classes with ``name``, ``requires``, ``widens`` and ``merge(pool, width, rng)``: how arrivals merge."""


@hook(since=1)
def dernkit_routers() -> list[type]:  # type: ignore[empty-body]
    """Routers: classes with ``name``, ``requires`` and ``update(rows, plan, stats)``: the kept experts' router rows."""


@hook(since=1)
def dernkit_refits() -> list[type]:  # type: ignore[empty-body]
    """Refits: classes with ``name``, ``requires`` and ``refit(bank, after, plan, stats)``: new down projections."""


@hook(since=1)
def dernkit_sources() -> list[type]:  # type: ignore[empty-body]
    """Sources: classes with ``name`` and ``tokens(tokenizer, sequences, length, rng)``: calibration tokens."""


@hook(since=1)
def dernkit_evaluators() -> list[type]:  # type: ignore[empty-body]
    """Evaluators: classes with ``name`` and ``evaluate(subject)``: metric names and values of one model."""


@hook(since=1)
def dernkit_reports() -> list[type]:  # type: ignore[empty-body]
    """Reports: classes with ``name``, ``filename`` and ``render(run)``: a document about one run."""


@hook(since=1)
def dernkit_adapters() -> list[type]:  # type: ignore[empty-body]
    """Adapters: classes with ``name`` and ``blocks(model)``: where a family keeps its experts."""


@hook(since=1)
def dernkit_architectures() -> list[type]:  # type: ignore[empty-body]
    """Architectures: classes with ``name``, ``config_class()``, ``model_class()`` and ``conversions()``: new models."""
