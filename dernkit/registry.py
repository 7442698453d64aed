"""Who provides what: plugins -> components by kind and name. Built-ins come in by the same door as strangers."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from importlib import metadata
from typing import Any

import pluggy

from dernkit import hookspecs
from dernkit.components import KINDS, Component, Kind, check_attribute, component_of, provenance_of
from dernkit.errors import PluginError, RecipeError
from dernkit.sentences import did_you_mean

GROUP = "dernkit"
"""Entry-point group in which plugins announce themselves."""

BUILTINS = (
    "dernkit.builtin.scorers",
    "dernkit.builtin.weight_scorers",
    "dernkit.builtin.output_scorers",
    "dernkit.builtin.protection",
    "dernkit.builtin.budgets",
    "dernkit.builtin.selectors",
    "dernkit.builtin.assigners",
    "dernkit.builtin.similarities",
    "dernkit.builtin.merges",
    "dernkit.builtin.routers",
    "dernkit.builtin.sources",
    "dernkit.builtin.evaluators",
    "dernkit.builtin.reports",
    "dernkit.models.universal",
)


class Registry:
    """All components that recipes can name. There is no global one: whoever needs a registry is given it.

    ``problems`` holds a PluginError for each thing that an installed plugin got wrong; the rest of it is usable.
    """

    def __init__(self) -> None:
        self.problems: list[PluginError] = []
        self._components: dict[tuple[str, str], Component] = {}
        self._hooks = pluggy.PluginManager("dernkit")
        self._hooks.add_hookspecs(hookspecs)

    @classmethod
    def load(cls, entry_points: bool = True) -> Registry:
        """A registry with the built-ins and, unless told otherwise, with all installed plugins."""
        registry = cls()
        version = metadata.version("dernkit")
        for module in BUILTINS:
            registry.register(importlib.import_module(module), module, distribution="dernkit", version=version)
        if entry_points:
            for point in sorted(metadata.entry_points(group=GROUP), key=_entry_order):
                registry._load_entry_point(point)
        return registry

    def register(self, plugin: Any, name: str, *, distribution: str = "local", version: str = "0") -> None:
        """Adds all components of a plugin, or none.

        Raises:
            PluginError: the first thing that is wrong with it.
        """
        components, problems = self._inspect(plugin, name, distribution, version)
        if problems:
            if self._hooks.get_plugin(f"{distribution}:{name}") is plugin:
                self._hooks.unregister(plugin)
            raise problems[0]
        self._add(components)

    def names(self, kind: str) -> list[str]:
        """The installed names of a kind, in alphabetical order."""
        return sorted(name for known, name in self._components if known == kind)

    def get(self, kind: str, name: str) -> Component:
        """The component of that kind and name.

        Raises:
            RecipeError: there is none; says what was meant, what is installed, and which plugins failed to load.
        """
        if (kind, name) in self._components:
            return self._components[kind, name]
        installed = self.names(kind)
        parts = [f"unknown {kind} '{name}'.", did_you_mean(name, installed)]
        parts.append(f"Installed: {', '.join(installed) or 'none'}.")
        parts += [f"Failed to load: {problem}" for problem in self.problems]
        raise RecipeError(" ".join(part for part in parts if part))

    def components(self, kind: str | None = None) -> Iterator[Component]:
        """All components, or those of one kind, by kind and name."""
        for known in KINDS if kind is None else (kind,):
            yield from (self._components[known, name] for name in self.names(known))

    def requires(self, kind: str, instance: Any) -> frozenset[str]:
        """Statistics that a bound component reads, those of the components that it holds included."""
        found: frozenset[str] = frozenset()
        if KINDS[kind].reads_statistics:
            check_attribute("requires", instance.requires)
            found = instance.requires
        for option in self.get(kind, instance.name).options:
            value = getattr(instance, option.name)
            if option.nested and value is not None:
                found |= self.requires(option.nested, value)
        return found

    def _load_entry_point(self, point: metadata.EntryPoint) -> None:
        distribution, version = _distribution(point)
        try:
            plugin = point.load()
        except (Exception, SystemExit) as error:
            self.problems.append(_broken(point.name, distribution, version, "be importable", error))
            return
        components, problems = self._inspect(plugin, point.name, distribution, version)
        self._add(components)
        self.problems += problems

    def _add(self, components: Iterable[Component]) -> None:
        self._components |= {(component.kind, component.name): component for component in components}

    def _inspect(
        self, plugin: Any, name: str, distribution: str, version: str
    ) -> tuple[list[Component], list[PluginError]]:
        """The valid components of a plugin and a problem for each of the others."""
        try:
            self._register_hooks(plugin, f"{distribution}:{name}")
        except Exception as error:
            return [], [_broken(name, distribution, version, "implement hooks of dernkit as they are specified", error)]
        components: dict[tuple[str, str], Component] = {}
        problems = []
        for kind in KINDS.values():
            try:
                classes = self._classes(kind, plugin)
            except Exception as error:
                problems.append(_broken(name, distribution, version, f"return classes from {kind.hook}()", error))
                continue
            for cls in classes:
                try:
                    component = component_of(kind, cls, provenance_of(cls, name, distribution, version))
                    _check_collision(self._components | components, component)
                    components[component.kind, component.name] = component
                except PluginError as error:
                    problems.append(error)
        return list(components.values()), problems

    def _register_hooks(self, plugin: Any, name: str) -> None:
        try:
            self._hooks.register(plugin, name)
            self._hooks.check_pending()
        except pluggy.PluginValidationError as error:
            unknown = [hook.name for hook in self._hooks.get_hookcallers(plugin) or [] if not hook.has_spec()]
            self._hooks.unregister(plugin)
            hint = did_you_mean(unknown[0], [kind.hook for kind in KINDS.values()]) if unknown else ""
            raise ValueError(f"{' '.join(str(error).split())}. {hint}".strip()) from error

    def _classes(self, kind: Kind, plugin: Any) -> list[Any]:
        hook = getattr(self._hooks.hook, kind.hook)
        found: list[Any] = []
        for implementation in hook.get_hookimpls():
            if implementation.plugin is plugin:
                classes = implementation.function()
                if not isinstance(classes, list | tuple):
                    raise TypeError(f"{type(classes).__name__} is not a list")
                found += classes
        return found


def _check_collision(components: dict[tuple[str, str], Component], new: Component) -> None:
    old = components.get((new.kind, new.name))
    if old is not None:
        raise PluginError(
            f"{new.provenance.file}:{new.provenance.line}: {new.kind} '{new.name}' must have one provider. "
            f"Got {new.provenance.origin} and, before it, {old.provenance.origin} instead. Uninstall or rename one."
        )


def _broken(name: str, distribution: str, version: str, must: str, error: BaseException) -> PluginError:
    detail = f"{type(error).__name__}: {error}".rstrip(".")
    problem = PluginError(f"plugin '{name}' ({distribution} {version}) must {must}. Got {detail} instead.")
    problem.__cause__ = error
    return problem


def _distribution(point: metadata.EntryPoint) -> tuple[str, str]:
    return ("unknown", "0") if point.dist is None else (point.dist.name, point.dist.version)


def _entry_order(point: metadata.EntryPoint) -> tuple[str, str, str]:
    return (*_distribution(point), point.name)
