"""One component: its kind, what its class must look like, and where it comes from."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import Any

from dernkit import api
from dernkit.errors import PluginError
from dernkit.options import Option, options_of
from dernkit.types import STATISTICS


@dataclass(frozen=True, slots=True)
class Names:
    """How the components of a kind may be called: a pattern, and the same in words."""

    pattern: re.Pattern[str]
    words: str


WORD = Names(re.compile(r"[a-z0-9]+(-[a-z0-9]+)*"), "lower-case letters and digits with single hyphens between")
MODEL_TYPE = Names(re.compile(r"\w[\w.-]*"), "letters, digits, `_`, `-` and `.`, as config.json has it as `model_type`")


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of component: the hook that collects its classes and the protocol that they follow."""

    name: str
    hook: str
    protocol: type
    names: Names = WORD

    @property
    def methods(self) -> tuple[str, ...]:
        """Methods that a class must have."""
        return tuple(name for name, value in vars(self.protocol).items() if _is_method(name, value))

    @property
    def attributes(self) -> frozenset[str]:
        """Class attributes that a class must have."""
        return frozenset(self.protocol.__annotations__)

    @property
    def reads_statistics(self) -> bool:
        """Whether its components declare the statistics that they read."""
        return "requires" in self.attributes


KINDS = {
    kind.name: kind
    for kind in (
        Kind("scorer", "dernkit_scorers", api.Scorer),
        Kind("budget", "dernkit_budgets", api.Budget),
        Kind("selector", "dernkit_selectors", api.Selector),
        Kind("assigner", "dernkit_assigners", api.Assigner),
        Kind("similarity", "dernkit_similarities", api.Similarity),
        Kind("merge", "dernkit_merges", api.Merge),
        Kind("router", "dernkit_routers", api.Router),
        Kind("refit", "dernkit_refits", api.Refit),
        Kind("source", "dernkit_sources", api.Source),
        Kind("evaluator", "dernkit_evaluators", api.Evaluator),
        Kind("report", "dernkit_reports", api.Report),
        Kind("adapter", "dernkit_adapters", api.Adapter),
        Kind("architecture", "dernkit_architectures", api.Architecture, MODEL_TYPE),
    )
}
PROTOCOLS = {kind.protocol: kind.name for kind in KINDS.values()}


@dataclass(frozen=True, slots=True)
class Origin:
    """A plugin and the distribution that brings it."""

    plugin: str
    distribution: str
    version: str

    def __str__(self) -> str:
        return f"plugin '{self.plugin}' ({self.distribution} {self.version})"


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where a component comes from."""

    plugin: str
    distribution: str
    version: str
    file: str
    line: int

    @property
    def origin(self) -> str:
        """Plugin and distribution in words."""
        return str(Origin(self.plugin, self.distribution, self.version))


@dataclass(frozen=True, slots=True)
class Component:
    """A registered component."""

    kind: str
    name: str
    cls: type
    options: tuple[Option, ...]
    provenance: Provenance

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (vars(self.cls).get("__doc__") or "").strip().split("\n")[0]

    def option(self, name: str) -> Option | None:
        """The option of that name."""
        return next((option for option in self.options if option.name == name), None)


def component_of(kind: Kind, cls: Any, provenance: Provenance) -> Component:
    """The component that a class describes.

    Raises:
        PluginError: the class is not a component of its kind; one sentence that starts with the place of the class.
    """
    try:
        _check_dataclass(cls)
        _check_name(kind, cls)
        for method in kind.methods:
            _check_method(kind, cls, method)
        options = _options(cls)
        _check_attributes(kind, cls, options)
    except (Exception, SystemExit) as error:
        called = cls.__name__ if isinstance(cls, type) else repr(cls)
        reason = f"must be readable. Got {type(error).__name__}: {error} instead."
        reason = str(error) if isinstance(error, ValueError) else reason
        where = f"{provenance.file}:{provenance.line}"
        raise PluginError(f"{where}: {kind.name} {called} of {provenance.origin} {reason}") from error
    return Component(kind.name, cls.name, cls, options, provenance)


def provenance_of(cls: Any, origin: Origin, hook: Any = None) -> Provenance:
    """Where a class comes from (what is none: the hook that returned it); file ``?`` when no source can be read."""
    file, line = "?", 0
    for place in (cls, hook):
        try:
            file, line = inspect.getsourcefile(place) or "?", inspect.getsourcelines(place)[1]
            break
        except (OSError, TypeError):
            continue
    return Provenance(origin.plugin, origin.distribution, origin.version, file, line)


def _check_dataclass(cls: Any) -> None:
    if not isinstance(cls, type):
        raise ValueError("must be a class. Got an object instead. Return the class, not an instance of it.")
    parameters = vars(cls).get("__dataclass_params__")
    if parameters is None or not parameters.frozen:
        found = "a plain class" if parameters is None else "one that can be changed"
        raise ValueError(f"must be a frozen dataclass. Got {found} instead. Decorate it with @dataclass(frozen=True).")


def _check_name(kind: Kind, cls: Any) -> None:
    if any(field.name == "name" for field in dataclasses.fields(cls)):
        raise ValueError("must have a `name` of the class. Got an option instead. Annotate it with ClassVar[str].")
    name = vars(cls).get("name")
    if not isinstance(name, str) or not kind.names.pattern.fullmatch(name):
        raise ValueError(
            f"must have a `name` in {kind.names.words}. Got {name!r} instead. Write name: ClassVar[str] = 'my-word'."
        )


def _check_method(kind: Kind, cls: Any, method: str) -> None:
    wanted = _parameters(vars(kind.protocol)[method], bound=False)
    raw = inspect.getattr_static(cls, method, None)
    if not callable(raw) and not isinstance(raw, staticmethod | classmethod):
        raise ValueError(f"must have the method {method}({', '.join(wanted)}). Got none instead.")
    found = _parameters(getattr(cls, method), bound=isinstance(raw, staticmethod | classmethod))
    if found != wanted:
        raise ValueError(
            f"must have the method {method}({', '.join(wanted)}). Got {method}({', '.join(found)}) instead."
        )


def _options(cls: Any) -> tuple[Option, ...]:
    fields = dataclasses.fields(cls)
    for field in fields:
        if not field.init:
            raise ValueError(f"must not keep state. Got the field '{field.name}' with init=False instead.")
        if field.name == "use":
            raise ValueError("must not have an option 'use'. Got one instead. Recipes name components with that word.")
    return options_of(cls, fields, PROTOCOLS)


def _check_attributes(kind: Kind, cls: Any, options: tuple[Option, ...]) -> None:
    """``requires``, flags, ``filename``; a property is looked up on a default instance if there can be one."""
    for attribute in sorted(kind.attributes - {"name"}):
        if any(option.name == attribute for option in options):
            raise ValueError(f"must have a class attribute `{attribute}`. Got an option instead. Use ClassVar.")
        value = inspect.getattr_static(cls, attribute, None)
        if isinstance(value, property):
            if any(option.required for option in options):
                continue
            value = getattr(cls(), attribute)
        check_attribute(attribute, value)


def check_attribute(attribute: str, value: Any) -> None:
    """Raises ValueError when a class attribute does not hold what the protocols say."""
    if attribute == "requires":
        if not isinstance(value, frozenset):
            raise ValueError(f"must have a frozenset `requires`. Got {value!r} instead.")
        if unknown := sorted(map(str, value - STATISTICS.keys())):
            known = ", ".join(STATISTICS)
            raise ValueError(f"must require known statistics. Got '{unknown[0]}' instead. Known: {known}.")
    elif attribute in ("widens", "groups", "needs_groups", "needs_measures") and not isinstance(value, bool):
        raise ValueError(f"must have `{attribute}` true or false. Got {value!r} instead.")
    elif attribute == "filename" and not isinstance(value, str):
        raise ValueError(f"must have a `filename`. Got {value!r} instead.")


def _is_method(name: str, value: Any) -> bool:
    return inspect.isfunction(value) and not name.startswith("_")


def _parameters(function: Any, *, bound: bool) -> list[str]:
    names = list(inspect.signature(function).parameters)
    return names if bound else names[1:]
