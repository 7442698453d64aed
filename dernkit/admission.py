"""What a plugin is refused for, or warned of, before its components are looked at: one sentence each."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import Any

from dernkit.components import Component, Origin
from dernkit.errors import DeprecatedHookWarning, PluginError
from dernkit.hookspecs import Hook
from dernkit.imports import private_imports


def check_named(origin: Origin) -> None:
    """The entry point has a name."""
    if not origin.plugin.strip():
        raise PluginError(
            f"plugin of {origin.distribution} {origin.version}: must have a name. Got none instead. "
            "Write my-plugin = 'my_module' below [project.entry-points.dernkit]."
        )


def check_version(origin: Origin, plugin: Any, installed: int) -> None:
    """``dernkit_api`` says for which version of the plugin API a plugin was written; most do not need to say it."""
    wanted = getattr(plugin, "dernkit_api", installed)
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise PluginError(f"{origin} must have a version from 1 up as `dernkit_api`. Got {wanted!r} instead.")
    if wanted > installed:
        raise PluginError(
            f"{origin} must be written for version {installed} of the plugin API, which dernkit "
            f"{metadata.version('dernkit')} has, or an older one. Got version {wanted} instead. Upgrade dernkit."
        )


def check_arguments(origin: Origin, function: Any, hook: Hook) -> None:
    """A hook takes nothing: pluggy ignores arguments with a default, or not, depending on its release."""
    parameters = inspect.signature(function).parameters.values()
    if wrong := [found for found in parameters if found.name not in hook.unused or found.default is not found.empty]:
        code = inspect.unwrap(function).__code__
        raise PluginError(
            f"{code.co_filename}:{code.co_firstlineno}: {function.__name__}() of {origin} must take no arguments. "
            f"Got '{wrong[0]}' instead. Remove it."
        )


def check_imports(origin: Origin, plugin: Any) -> None:
    """Nothing private of dernkit is imported."""
    for found in private_imports(plugin):
        raise PluginError(
            f"{found.file}:{found.line}: {origin} must import nothing private of dernkit. "
            f"Got '{found.module}' instead. {found.fix}"
        )


def check_collision(components: Mapping[tuple[str, str], Component], new: Component) -> None:
    """A name of a kind has one provider."""
    old = components.get((new.kind, new.name))
    if old is not None:
        raise PluginError(
            f"{new.provenance.file}:{new.provenance.line}: {new.kind} '{new.name}' must have one provider. "
            f"Got {new.provenance.origin} and, before it, {old.provenance.origin} instead. Uninstall or rename one."
        )


@contextmanager
def naming_deprecated(origin: Origin) -> Iterator[None]:
    """Warnings of deprecated hooks, with the plugin in front of the sentence."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DeprecatedHookWarning)
        yield
    for warning in caught:
        message = warning.message
        if isinstance(message, DeprecatedHookWarning):
            message = DeprecatedHookWarning(f"{origin}: {message}")
        warnings.warn_explicit(message, warning.category, warning.filename, warning.lineno)


def broken(origin: Origin, must: str, error: BaseException) -> PluginError:
    """The problem that an exception is."""
    detail = f"{type(error).__name__}: {error}".rstrip(".: ")
    problem = PluginError(f"{origin} must {must}. Got {detail} instead.")
    problem.__cause__ = error
    return problem
