"""The plugin API has a version: newer plugins are refused, and what is deprecated warns and works."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib import metadata
from types import ModuleType
from typing import Any, ClassVar

import pytest

from dernkit import hookspecs
from dernkit.api import API_VERSION, PluginError
from dernkit.errors import DeprecatedHookWarning
from dernkit.hookspecs import hook
from dernkit.registry import Registry
from tests.unit.toy_components import Reap, plugin_of


def specs() -> ModuleType:
    """The hooks of some later dernkit, in which one has been replaced and another has lost an argument."""
    module = ModuleType("later")

    @hook(since=2)
    def dernkit_scorers() -> list[type]: ...  # type: ignore[empty-body]

    @hook(since=1, replaced_by="dernkit_scorers")
    def dernkit_rankings() -> list[type]: ...  # type: ignore[empty-body]

    @hook(since=1, family="any")
    def dernkit_merges(family: str) -> list[type]: ...  # type: ignore[empty-body]

    for spec in (dernkit_scorers, dernkit_rankings, dernkit_merges):
        setattr(module, spec.__name__, spec)
    for name, value in vars(hookspecs).items():
        if name.startswith("dernkit_") and not hasattr(module, name):
            setattr(module, name, value)
    return module


def later() -> Registry:
    return Registry(specs(), version=2)


@dataclass(frozen=True)
class Merge:
    name: ClassVar[str] = "mine"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = False

    def merge(self, pool: Any, width: Any, rng: Any) -> Any: ...


def module_of(source: str, **values: Any) -> ModuleType:
    """A plugin with this text."""
    module = ModuleType("mine")
    vars(module).update(values)
    exec(compile(f"from dernkit.api import hookimpl\n{source}", "mine.py", "exec"), vars(module))
    return module


def test_every_hook_came_with_a_version_that_there_is() -> None:
    marks = [spec.hook for name, spec in vars(hookspecs).items() if name.startswith("dernkit_")]
    assert marks and all(1 <= mark.since <= API_VERSION for mark in marks)


def test_a_deprecated_hook_warns_with_plugin_place_and_replacement_and_works() -> None:
    registry = later()
    plugin = module_of("@hookimpl\ndef dernkit_rankings():\n    return [Reap]", Reap=Reap)
    with pytest.warns(DeprecatedHookWarning) as caught:
        registry.register(plugin, "old", distribution="old-plugin", version="0.9")
    (warning,) = caught
    assert str(warning.message) == (
        "plugin 'old' (old-plugin 0.9): dernkit_rankings is deprecated: implement dernkit_scorers instead"
    )
    assert (warning.filename, warning.lineno) == ("mine.py", 2)
    assert registry.get("scorer", "reap").provenance.distribution == "old-plugin"


def test_a_deprecated_argument_warns_and_still_gets_its_value() -> None:
    registry = later()
    source = "@hookimpl\ndef dernkit_merges(family):\n    return [Merge] if family == 'any' else 1 / 0"
    with pytest.warns(DeprecatedHookWarning) as caught:
        registry.register(module_of(source, Merge=Merge), "old", distribution="old-plugin", version="0.9")
    assert [str(warning.message) for warning in caught] == [
        "plugin 'old' (old-plugin 0.9): argument 'family' of dernkit_merges is deprecated: leave it out"
    ]
    assert registry.names("merge") == ["mine"]


def test_one_that_is_up_to_date_is_not_warned_of() -> None:
    registry = later()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        registry.register(plugin_of("dernkit_scorers", Reap), "new")
        registry.register(plugin_of("dernkit_merges", Merge), "new too")
    assert (registry.names("scorer"), registry.names("merge")) == (["reap"], ["mine"])


def test_the_old_hook_and_the_new_one_do_not_give_a_name_twice() -> None:
    registry = later()
    registry.register(plugin_of("dernkit_scorers", Reap), "new")
    with (
        pytest.warns(DeprecatedHookWarning),
        pytest.raises(PluginError, match="scorer 'reap' must have one provider"),
    ):
        registry.register(plugin_of("dernkit_rankings", Reap), "old")


def test_python_shows_the_warning_by_default() -> None:
    assert issubclass(DeprecatedHookWarning, FutureWarning)


def test_other_warnings_of_a_plugin_come_through_as_they_are() -> None:
    plugin = module_of("import warnings\n@hookimpl\ndef dernkit_scorers():\n    warnings.warn('mine')\n    return []")
    with pytest.warns(UserWarning, match="^mine$"):
        Registry().register(plugin, "loud")


@pytest.mark.parametrize("version", [None, 1, API_VERSION])
def test_a_plugin_may_say_for_which_version_it_was_written(version: int | None) -> None:
    plugin = plugin_of("dernkit_scorers", Reap)
    if version is not None:
        plugin.dernkit_api = version
    registry = Registry()
    registry.register(plugin, "mine")
    assert registry.names("scorer") == ["reap"]


def test_a_plugin_for_a_newer_version_is_refused_with_both() -> None:
    plugin = plugin_of("dernkit_scorers", Reap)
    plugin.dernkit_api = API_VERSION + 1
    registry = Registry()
    with pytest.raises(PluginError) as caught:
        registry.register(plugin, "mine", distribution="my-dist", version="1.2")
    assert str(caught.value) == (
        f"plugin 'mine' (my-dist 1.2) must be written for version {API_VERSION} of the plugin API, which dernkit "
        f"{metadata.version('dernkit')} has, or an older one. Got version {API_VERSION + 1} instead. Upgrade dernkit."
    )
    assert registry.names("scorer") == []
    Registry(version=API_VERSION + 1).register(plugin, "mine")


@pytest.mark.parametrize("version", ["1", 1.0, True, 0, -1, None])
def test_a_version_that_is_none_is_refused(version: object) -> None:
    plugin = plugin_of("dernkit_scorers", Reap)
    plugin.dernkit_api = version
    with pytest.raises(PluginError, match="must have a version from 1 up as `dernkit_api`"):
        Registry().register(plugin, "mine")
