"""The hooks of dernkit: who provides which components. One hook per kind, each returns a list of classes.

A plugin is a module (or object) named by an entry point of the group ``dernkit``; it implements any of these hooks with
``dernkit.api.hookimpl``. The classes are final frozen dataclasses: ``name`` is the recipe's word for the component and
the fields are its options, typed and bounded. What the method must do is written at the protocol in `dernkit.api`.
"""

from __future__ import annotations

import pluggy

hookspec = pluggy.HookspecMarker("dernkit")


@hookspec
def dernkit_scorers() -> list[type]:  # type: ignore[empty-body]
    """Scorers: classes with ``name``, ``requires`` and ``score(bank, stats)``: how much each expert matters."""


@hookspec
def dernkit_budgets() -> list[type]:  # type: ignore[empty-body]
    """Budgets: ``name``, ``requires``, ``measure(bank, scores, stats)`` and ``allocate(measures, keep, limits)``."""


@hookspec
def dernkit_selectors() -> list[type]:  # type: ignore[empty-body]
    """Selectors: classes with ``name``, ``requires`` and ``select(bank, scores, count, stats)``: which experts stay."""


@hookspec
def dernkit_assigners() -> list[type]:  # type: ignore[empty-body]
    """Assigners: classes with ``name``, ``requires`` and ``assign(bank, retention, stats)``: what goes where."""


@hookspec
def dernkit_similarities() -> list[type]:  # type: ignore[empty-body]
    """Similarities: classes with ``name``, ``requires`` and ``match(bank, dropped, kept, stats)``: what fits."""


@hookspec
def dernkit_merges() -> list[type]:  # type: ignore[empty-body]
    """Merges: classes with ``name``, ``requires``, ``widens`` and ``merge(pool, width, rng)``: how arrivals merge."""


@hookspec
def dernkit_routers() -> list[type]:  # type: ignore[empty-body]
    """Routers: classes with ``name``, ``requires`` and ``update(rows, plan, stats)``: the kept experts' router rows."""


@hookspec
def dernkit_sources() -> list[type]:  # type: ignore[empty-body]
    """Sources: classes with ``name`` and ``tokens(tokenizer, sequences, length, rng)``: calibration tokens."""


@hookspec
def dernkit_evaluators() -> list[type]:  # type: ignore[empty-body]
    """Evaluators: classes with ``name`` and ``evaluate(subject)``: metric names and values of one model."""


@hookspec
def dernkit_reports() -> list[type]:  # type: ignore[empty-body]
    """Reports: classes with ``name``, ``filename`` and ``render(run)``: a document about one run."""


@hookspec
def dernkit_adapters() -> list[type]:  # type: ignore[empty-body]
    """Adapters: classes with ``name`` and ``blocks(model)``: where a family keeps its experts."""


@hookspec
def dernkit_architectures() -> list[type]:  # type: ignore[empty-body]
    """Architectures: classes with ``name``, ``config_class()``, ``model_class()`` and ``conversions()``: new models."""
