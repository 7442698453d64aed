"""Who provides what: plugins -> components by kind and name. Built-ins come in by the same door as strangers."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any

import pluggy

from dernkit import hookspecs
from dernkit.admission import (
    broken,
    check_arguments,
    check_collision,
    check_imports,
    check_named,
    check_version,
    naming_deprecated,
)
from dernkit.api import API_VERSION
from dernkit.components import KINDS, Component, Kind, Origin, check_attribute, component_of, provenance_of
from dernkit.errors import ContractError, PluginError, RecipeError
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
    "dernkit.builtin.groupings",
    "dernkit.builtin.assigners",
    "dernkit.builtin.whole_expert",
    "dernkit.builtin.similarities",
    "dernkit.builtin.activation_similarities",
    "dernkit.builtin.matched",
    "dernkit.builtin.expert_similarities",
    "dernkit.builtin.merges",
    "dernkit.builtin.routers",
    "dernkit.builtin.refits",
    "dernkit.builtin.function_space",
    "dernkit.builtin.refit_loss",
    "dernkit.builtin.sources",
    "dernkit.builtin.self_generated",
    "dernkit.builtin.evaluators",
    "dernkit.builtin.generation",
    "dernkit.builtin.lm_eval",
    "dernkit.builtin.reports",
    "dernkit.models.universal",
)


class Registry:
    """All components that recipes can name. There is no global one: whoever needs a registry is given it.

    ``problems`` holds a PluginError for each thing that an installed plugin got wrong; the rest of it is usable.
    ``plugins``: whether installed plugins were looked for.

    Args:
        specs: a module with the hooks' specifications.
        version: version of the plugin API that they are.
    """

    def __init__(self, specs: ModuleType = hookspecs, version: int = API_VERSION) -> None:
        self.problems: list[PluginError] = []
        self.plugins = False
        self._components: dict[tuple[str, str], Component] = {}
        self._version = version
        self._specs = {name: spec.hook for name, spec in vars(specs).items() if name.startswith("dernkit_")}
        self._hooks = pluggy.PluginManager("dernkit")
        self._hooks.add_hookspecs(specs)

    @classmethod
    def load(cls, entry_points: bool = True) -> Registry:
        """A registry with the built-ins and, unless told otherwise, with all installed plugins."""
        registry = cls()
        version = metadata.version("dernkit")
        for module in BUILTINS:
            registry.register(importlib.import_module(module), module, distribution="dernkit", version=version)
        registry.plugins = entry_points
        if entry_points:
            for point in sorted(metadata.entry_points(group=GROUP), key=_entry_order):
                registry._load_entry_point(point)
        return registry

    def register(self, plugin: Any, name: str, *, distribution: str = "local", version: str = "0") -> None:
        """Adds all components of a plugin, or none.

        Raises:
            PluginError: the first thing that is wrong with it.
        """
        origin = Origin(name, distribution, version)
        components, problems = self._inspect(plugin, origin)
        if problems:
            if self._hooks.get_plugin(_key(origin)) is plugin:
                self._hooks.unregister(plugin)
            raise problems[0]
        self._add(components)

    @contextmanager
    def naming_plugins(self) -> Iterator[None]:
        """A ContractError that leaves has its plugin and distribution in front of the sentence."""
        try:
            yield
        except ContractError as error:
            component = self._components.get((error.kind, error.component))
            if component is None:
                raise
            who = f"{component.provenance.origin}, "
            raise error.by(who, error.kind, error.component, error.layer) from error

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
        origin = Origin(point.name, *_distribution(point))
        try:
            check_named(origin)
            plugin = point.load()
            check_imports(origin, plugin)
        except PluginError as problem:
            self.problems.append(problem)
        except (Exception, SystemExit) as error:
            self.problems.append(broken(origin, "be importable", error))
        else:
            components, problems = self._inspect(plugin, origin)
            self._add(components)
            self.problems += problems

    def _add(self, components: Iterable[Component]) -> None:
        self._components |= {(component.kind, component.name): component for component in components}

    def _inspect(self, plugin: Any, origin: Origin) -> tuple[list[Component], list[PluginError]]:
        """The valid components of a plugin and a problem for each of the others."""
        try:
            check_named(origin)
            check_version(origin, plugin, self._version)
            for function, spec in self._implementations(plugin):
                check_arguments(origin, function, spec)
            self._register_hooks(plugin, origin)
        except PluginError as problem:
            return [], [problem]
        except Exception as error:
            return [], [broken(origin, "implement hooks of dernkit as they are specified", error)]
        components: dict[tuple[str, str], Component] = {}
        problems = []
        for kind, hook in self._kinds_by_hook():
            try:
                classes = self._classes(hook, plugin)
            except (Exception, SystemExit) as error:
                problems.append(broken(origin, f"return classes from {hook}()", error))
                continue
            for cls in classes:
                try:
                    component = component_of(kind, cls, provenance_of(cls, origin, getattr(plugin, hook, None)))
                    check_collision(self._components | components, component)
                    components[component.kind, component.name] = component
                except PluginError as error:
                    problems.append(error)
        return list(components.values()), problems

    def _kinds_by_hook(self) -> Iterator[tuple[Kind, str]]:
        """Every hook that is specified, those included that others have replaced, and the kind that it provides."""
        for kind in KINDS.values():
            hooks = [name for name, hook in self._specs.items() if kind.hook in (name, hook.replaced_by)]
            yield from ((kind, name) for name in hooks)

    def _implementations(self, plugin: Any) -> Iterator[tuple[Any, hookspecs.Hook]]:
        """The functions of a plugin that implement a specified hook."""
        for name in dir(plugin):
            options = self._hooks.parse_hookimpl_opts(plugin, name)
            hook = self._specs.get((options.get("specname") or name) if options else "")
            if hook is not None:
                yield getattr(plugin, name), hook

    def _register_hooks(self, plugin: Any, origin: Origin) -> None:
        try:
            with naming_deprecated(origin):
                self._hooks.register(plugin, _key(origin))
            self._hooks.check_pending()
        except pluggy.PluginValidationError as error:
            unknown = [hook.name for hook in self._hooks.get_hookcallers(plugin) or [] if not hook.has_spec()]
            if self._hooks.is_registered(plugin):
                self._hooks.unregister(plugin)
            hint = did_you_mean(unknown[0], self._specs) if unknown else ""
            raise ValueError(f"{' '.join(str(error).split())}. {hint}".strip()) from error

    def _classes(self, hook: str, plugin: Any) -> list[Any]:
        unused = self._specs[hook].unused
        found: list[Any] = []
        for implementation in getattr(self._hooks.hook, hook).get_hookimpls():
            if implementation.plugin is plugin:
                classes = implementation.function(*(unused[name] for name in implementation.argnames))
                if not isinstance(classes, list | tuple):
                    raise TypeError(f"{type(classes).__name__} is not a list")
                found += classes
        return found


def _key(origin: Origin) -> str:
    return f"{origin.distribution}:{origin.plugin}"


def _distribution(point: metadata.EntryPoint) -> tuple[str, str]:
    return ("unknown", "0") if point.dist is None else (point.dist.name, point.dist.version)


def _entry_order(point: metadata.EntryPoint) -> tuple[str, str, str]:
    return (*_distribution(point), point.name)
