"""One call of a component of each kind: arguments that can be made again, and the call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from dernkit.api import Writing
from dernkit.testing import cases
from dernkit.testing.cases import CASES, Case
from dernkit.types import LayerStats, Pool

Arguments = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Trial:
    """A call that can be made as often as needed: ``make`` builds its arguments, equal but new each time."""

    what: str
    make: Callable[[], Arguments]


def restricted(value: Any, names: frozenset[str]) -> Any:
    """Arguments with these statistics alone, as a run gives them to a component that requires them."""
    if isinstance(value, LayerStats):
        return value.only(names)
    if isinstance(value, Pool):
        return replace(value, stats=value.stats.only(names))
    if isinstance(value, list | tuple):
        return type(value)(restricted(entry, names) for entry in value)
    return value


def generator(seed: int = 3) -> torch.Generator:
    """The ``rng`` of a call."""
    return torch.Generator().manual_seed(seed)


def _scorer(found: Case) -> Iterator[Arguments]:
    yield found.bank, found.stats


def _selector(found: Case) -> Iterator[Arguments]:
    yield found.bank, found.scores, len(found.kept), found.stats


def _assigner(found: Case) -> Iterator[Arguments]:
    for retention in cases.retentions(found):
        yield found.bank, retention, found.stats


def _similarity(found: Case) -> Iterator[Arguments]:
    yield found.bank, found.dropped[0], found.kept, found.stats


def _merge(found: Case) -> Iterator[Arguments]:
    for pool in pools(found):
        yield pool, pool_width(pool), generator()


def pools(found: Case) -> Iterator[Pool]:
    """One whole expert arrives, parts of two, and a single segment."""
    yield cases.pool_of(found, found.dropped[:1])
    yield cases.pool_of(found, found.dropped[:2], every=2)
    yield cases.pool_of(found, found.dropped[:1], every=found.bank.dims.width)


def pool_width(pool: Pool, widens: bool = False) -> int:
    """The width that a merge is asked for."""
    return len(pool.own) + (len(pool.incoming) if widens else 0)


def _router(found: Case) -> Iterator[Arguments]:
    yield cases.rows_of(found), cases.plan_of(found), found.stats


def _refit(found: Case) -> Iterator[Arguments]:
    yield found.bank, cases.after_of(found), cases.plan_of(found), found.stats


def _budget(stack: Sequence[Case]) -> Iterator[Arguments]:
    banks, scores, stats = ([getattr(each, name) for each in stack] for name in ("bank", "scores", "stats"))
    for keep in (0.5, 1.0, len(stack[0].kept)):
        yield banks, scores, stats, keep, cases.limits_of(stack)


def _call_merge(merge: Any, pool: Pool, width: int, rng: torch.Generator) -> Any:
    return merge.merge(pool, pool_width(pool, merge.widens), rng)


def allocated(budget: Any, banks: Any, scores: Any, stats: Any, keep: Any, limits: Any) -> tuple[Any, Any]:
    """Measures of all layers, and the counts that follow."""
    measures = [budget.measure(*layer) for layer in zip(banks, scores, stats, strict=True)]
    return measures, budget.allocate(measures, keep, limits)


_ARGUMENTS: Mapping[str, Callable[[Any], Iterator[Arguments]]] = {
    "scorer": _scorer,
    "budget": _budget,
    "selector": _selector,
    "assigner": _assigner,
    "similarity": _similarity,
    "merge": _merge,
    "router": _router,
    "refit": _refit,
}
LAYER_KINDS = tuple(_ARGUMENTS)
"""Kinds that work on layers; the others need files, models or runs."""


class _Monkey:
    """A model to which all tokens of the kit's tokenizer are equally likely."""

    def continued(
        self, prompts: torch.Tensor, length: int, choose: Callable[[torch.Tensor], torch.Tensor]
    ) -> torch.Tensor:
        from dernkit.testing.checkpoints import tiny_tokenizer

        logits = torch.zeros(len(prompts), len(tiny_tokenizer()))
        while prompts.shape[1] < length:
            prompts = torch.cat([prompts, choose(logits)[:, None]], dim=1)
        return prompts


_CALLS: Mapping[str, Callable[..., Any]] = {
    "scorer": lambda component, *given: component.score(*given),
    "budget": allocated,
    "selector": lambda component, *given: component.select(*given),
    "assigner": lambda component, *given: component.assign(*given),
    "similarity": lambda component, *given: component.match(*given),
    "merge": _call_merge,
    "router": lambda component, *given: component.update(*given),
    "refit": lambda component, *given: component.refit(*given),
    "source": lambda component, *given: (
        component.write(_Monkey(), *given) if isinstance(component, Writing) else component.tokens(*given)
    ),
    "evaluator": lambda component, *given: component.evaluate(*given),
    "report": lambda component, *given: component.render(*given),
}


def call(kind: str, component: Any, arguments: Arguments) -> Any:
    """What the component's method returns."""
    return _CALLS[kind](component, *arguments)


def trials(kind: str) -> list[Trial]:
    """Calls of a layer kind on all cases, and on one whose routing is not known."""
    hidden = partial(cases.case, "a routing that cannot be repeated", changes={"route": None})
    found = []
    builds: list[Callable[..., Case]] = [*CASES, hidden]
    for build in builds:
        made = partial(_made, kind, build)
        what = build.args[0]  # type: ignore[attr-defined]
        found += [Trial(what, partial(_nth, made, number)) for number in range(len(made()))]
    return found


def _made(kind: str, build: Callable[..., Case]) -> list[Arguments]:
    given = cases.layers(build) if kind == "budget" else build()
    return list(_ARGUMENTS[kind](given))


def _nth(made: Callable[[], list[Arguments]], number: int) -> Arguments:
    return made()[number]
