"""Plain data -> bound components: checks everything, collects all problems, builds what is sound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dernkit.document import Document, Keys
from dernkit.errors import DernkitError, RecipeError
from dernkit.sentences import did_you_mean, reason, shown
from dernkit.shapes import Maybe, Nested, Shape

if TYPE_CHECKING:
    from dernkit.components import Component
    from dernkit.registry import Registry


class Binder:
    """Reads the values of one document. A value that has a problem reads as None."""

    def __init__(self, document: Document, registry: Registry, what: str = "a recipe") -> None:
        self.document = document
        self.registry = registry
        self._what = what
        self.requires: list[tuple[str, frozenset[str]]] = []
        """Name of each bound component and the statistics that it reads."""

    def value(self, keys: Keys) -> Any:
        """The plain value at ``keys``, None when there is none."""
        value = self.document.data
        for key in keys:
            if isinstance(value, Mapping):
                value = value.get(key)
            elif isinstance(value, list | tuple) and isinstance(key, int):
                value = value[key]
            else:
                return None
        return value

    def section(self, keys: Keys, known: Sequence[str]) -> bool:
        """Whether there is a mapping at ``keys``; keys of it that are not ``known`` are problems."""
        value = self.value(keys)
        if not isinstance(value, Mapping):
            if value is not None:
                self.problem(keys, f"must be a mapping. Got {shown(value)} instead.")
            return False
        for key in value:
            if key not in known:
                what = f"'{'.'.join(map(str, keys))}'" if keys else self._what
                hint = _hint(str(key), known, f"Keys: {', '.join(known)}.")
                self.problem((*keys, str(key)), f"{what} has no key '{key}'. {hint}")
        return True

    def entry(self, keys: Keys, shape: Shape, default: Any = None) -> Any:
        """A value of the given shape; without a default it must be given."""
        value = self.value(keys)
        if value is None:
            if default is None:
                self.missing(keys)
            return default
        return self._parse(keys, shape, value)

    def entries(self, keys: Keys) -> range:
        """Positions of the list at ``keys``, none when there is no list."""
        value = self.value(keys)
        if value is not None and not isinstance(value, list | tuple):
            self.problem(keys, f"must be a list. Got {shown(value)} instead.")
            return range(0)
        return range(len(value or ()))

    def component(self, keys: Keys, kind: str, default: str | None = None) -> Any:
        """The component that ``{use: name, option: value}`` means; ``default`` is the name to use without one."""
        value = self.value(keys)
        if value is None and default is None:
            self.missing(keys)
            return None
        if value is not None and not isinstance(value, Mapping):
            names = self.registry.names(kind)
            name = value if value in names else next(iter(names), "name")
            self.problem(keys, f"must be a mapping. Got {shown(value)} instead. Write {{use: {name}}}.")
            return None
        given = dict(value or {"use": default})
        component = self._named((*keys, "use"), kind, given.pop("use", None))
        return None if component is None else self._build(keys, component, given)

    def missing(self, keys: Keys) -> None:
        """Notes that nothing is given where something must be."""
        self.problem(keys, "must be given. Got nothing instead.")

    def problem(self, keys: Keys, sentence: str) -> None:
        """Notes that the value at ``keys`` must be otherwise."""
        self.document.problem(keys, sentence)

    def _named(self, keys: Keys, kind: str, name: Any) -> Component | None:
        if not isinstance(name, str):
            installed = ", ".join(self.registry.names(kind)) or "none"
            found = "nothing" if name is None else shown(name)
            self.problem(keys, f"must be the name of a {kind}. Got {found} instead. Installed: {installed}.")
            return None
        try:
            return self.registry.get(kind, name)
        except RecipeError as error:
            self.problem(keys, str(error))
            return None

    def _build(self, keys: Keys, component: Component, given: dict[str, Any]) -> Any:
        before = len(self.document.problems)
        options = {option.name: option for option in component.options}
        for name in given:
            if name not in options:
                hint = _hint(str(name), options, f"Options: {', '.join(options) or 'none'}.")
                self.problem((*keys, str(name)), f"'{component.name}' has no option '{name}'. {hint}")
        values = {}
        for name, option in options.items():
            if name in given:
                values[name] = self._parse((*keys, name), option.shape, given[name])
            elif option.required:
                self.missing((*keys, name))
        if len(self.document.problems) > before:
            return None
        try:
            instance = component.cls(**values)
            self.requires.append((component.name, self.registry.requires(component.kind, instance)))
        except (ValueError, DernkitError) as error:
            self.problem(keys, str(error))
            return None
        except (Exception, SystemExit) as error:
            found = f"{type(error).__name__}: {reason(error)}"
            origin = component.provenance.origin
            self.problem(keys, f"{component.kind} '{component.name}' of {origin} must be built. Got {found} instead.")
            return None
        return instance

    def _parse(self, keys: Keys, shape: Shape, value: Any) -> Any:
        inner = shape.inner if isinstance(shape, Maybe) and value is not None else shape
        if isinstance(inner, Nested):
            return self.component(keys, inner.kind)
        try:
            return shape.parse(value, self.document.base_of(keys))
        except ValueError as error:
            self.problem(keys, str(error))
            return None


def _hint(name: str, known: Iterable[str], otherwise: str) -> str:
    return did_you_mean(name, known) or otherwise
