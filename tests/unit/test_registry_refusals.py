"""Which classes are refused as components, and with what sentence."""

import inspect
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
from annotated_types import Ge, Interval

from dernkit.api import PluginError
from dernkit.components import KINDS
from dernkit.registry import Registry
from tests.unit.toy_components import plugin_of


def refusal(cls: Any, hook: str = "dernkit_scorers") -> str:
    """What registering a class says after the place of the class, which is checked here."""
    with pytest.raises(PluginError) as caught:
        Registry().register(plugin_of(hook, cls), "mine", distribution="my-dist", version="1.2")
    place, _, sentence = str(caught.value).partition(": ")
    if isinstance(cls, type):
        assert place == f"{__file__}:{inspect.getsourcelines(cls)[1]}"
    kind, _, rest = sentence.partition(" of plugin 'mine' (my-dist 1.2) ")
    assert kind.split()[0] in KINDS
    return rest


def score(self: Any, bank: Any, stats: Any) -> Any: ...


NONE: frozenset[str] = frozenset()


class Plain:
    name = "plain"


@dataclass
class Mutable:
    name: ClassVar[str] = "mutable"


@dataclass(frozen=True)
class NamedByOption:
    name: str = "x"


@dataclass(frozen=True)
class BadName:
    name: ClassVar[str] = "Bad_Name"


@dataclass(frozen=True)
class NoMethod:
    name: ClassVar[str] = "no-method"
    requires: ClassVar[frozenset[str]] = NONE


@dataclass(frozen=True)
class OtherParameters:
    name: ClassVar[str] = "other"
    requires: ClassVar[frozenset[str]] = NONE

    def score(self, bank: Any, statistics: Any) -> Any: ...


@dataclass(frozen=True)
class NoRequires:
    name: ClassVar[str] = "no-requires"
    score = score


@dataclass(frozen=True)
class UnknownStatistic:
    name: ClassVar[str] = "unknown-statistic"
    score = score

    @property
    def requires(self) -> frozenset[str]:
        return frozenset({"gate_sums"})


@dataclass(frozen=True)
class Unbounded:
    name: ClassVar[str] = "unbounded"
    requires: ClassVar[frozenset[str]] = NONE
    power: Annotated[float, Ge(0)] = 1.0
    score = score


@dataclass(frozen=True)
class Infinite:
    name: ClassVar[str] = "infinite"
    requires: ClassVar[frozenset[str]] = NONE
    power: Annotated[float, Interval(ge=0, le=float("inf"))] = 1.0
    score = score


@dataclass(frozen=True)
class Untyped:
    name: ClassVar[str] = "untyped"
    requires: ClassVar[frozenset[str]] = NONE
    anything: Any = None
    score = score


@dataclass(frozen=True)
class BadDefault:
    name: ClassVar[str] = "bad-default"
    requires: ClassVar[frozenset[str]] = NONE
    power: Annotated[float, Interval(ge=0, le=1)] = 2.0
    score = score


@dataclass(frozen=True)
class Reserved:
    name: ClassVar[str] = "reserved"
    requires: ClassVar[frozenset[str]] = NONE
    use: bool = False
    score = score


@dataclass(frozen=True)
class Unresolvable:
    name: ClassVar[str] = "unresolvable"
    requires: ClassVar[frozenset[str]] = NONE
    mode: "Nowhere" = None  # type: ignore[name-defined]  # noqa: F821
    score = score


@dataclass(frozen=True)
class NoWidens:
    name: ClassVar[str] = "no-widens"
    requires: ClassVar[frozenset[str]] = NONE

    def merge(self, pool: Any, width: Any, rng: Any) -> Any: ...


@dataclass(frozen=True)
class NoNeedsMeasures:
    name: ClassVar[str] = "no-needs-measures"
    requires: ClassVar[frozenset[str]] = NONE

    def measure(self, bank: Any, scores: Any, stats: Any) -> Any: ...

    def allocate(self, measures: Any, keep: Any, limits: Any) -> Any: ...


@pytest.mark.parametrize(
    ("cls", "sentence"),
    [
        (Plain, "must be a frozen dataclass. Got a plain class instead. Decorate it with @dataclass(frozen=True)."),
        (Mutable, "must be a frozen dataclass. Got one that can be changed instead."),
        (NamedByOption, "must have a `name` of the class. Got an option instead. Annotate it with ClassVar[str]."),
        (BadName, "must have a `name` in lower-case letters and digits with single hyphens between. Got 'Bad_Name'"),
        (NoMethod, "must have the method score(bank, stats). Got none instead."),
        (OtherParameters, "must have the method score(bank, stats). Got score(bank, statistics) instead."),
        (NoRequires, "must have a frozenset `requires`. Got None instead."),
        (UnknownStatistic, "must require known statistics. Got 'gate_sums' instead. Known: routed, gate_sum,"),
        (
            Unbounded,
            "option 'power' must have a finite lower and upper bound. Got a free float instead. "
            "Write Annotated[float, Interval(ge=..., le=...)].",
        ),
        (Infinite, "option 'power' must have a finite lower and upper bound. Got a free float instead."),
        (Untyped, "option 'anything' must be bool, str, Path, Literal, a bounded int or float, a tuple of str or"),
        (BadDefault, "option 'power' must be between 0 and 1. Got 2.0 instead."),
        (Reserved, "must not have an option 'use'. Got one instead."),
        (Unresolvable, "option types must exist at run time. Got NameError: name 'Nowhere' is not defined instead."),
        (OtherParameters(), "must be a class. Got an object instead. Return the class, not an instance of it."),
    ],
    ids=lambda value: getattr(value, "__name__", None) or type(value).__name__,
)
def test_a_class_that_is_no_component_is_refused_with_its_place(cls: Any, sentence: str) -> None:
    assert refusal(cls).startswith(sentence)


def test_a_merge_must_say_whether_it_widens() -> None:
    assert refusal(NoWidens, "dernkit_merges") == "must have `widens` true or false. Got None instead."


def test_a_budget_must_say_whether_it_needs_measures() -> None:
    sentence = "must have `needs_measures` true or false. Got None instead."
    assert refusal(NoNeedsMeasures, "dernkit_budgets") == sentence
