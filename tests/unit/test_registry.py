"""Who provides what: validation, collisions, and broken plugins that stop nobody else."""

from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import pytest
from annotated_types import Interval

from dernkit.api import PluginError, RecipeError
from dernkit.components import Origin, provenance_of
from dernkit.registry import BUILTINS, Registry
from tests.unit import toy_components
from tests.unit.installed import PLUGIN, Install, installed
from tests.unit.toy_components import plugin_of, toy_registry

__all__ = ["installed"]


def test_a_plugin_with_a_problem_adds_nothing_and_can_be_registered_again_when_mended() -> None:
    registry = Registry()
    module = plugin_of("dernkit_scorers", toy_components.Reap, object)
    with pytest.raises(PluginError):
        registry.register(module, "mine")
    assert registry.names("scorer") == []
    module.dernkit_scorers = plugin_of("dernkit_scorers", toy_components.Reap).dernkit_scorers
    registry.register(module, "mine")
    assert registry.names("scorer") == ["reap"]


def test_a_collision_names_both_plugins_and_the_first_stays() -> None:
    registry = Registry()
    registry.register(plugin_of("dernkit_scorers", toy_components.Reap), "first", distribution="one", version="1.0")
    with pytest.raises(PluginError) as caught:
        registry.register(
            plugin_of("dernkit_scorers", toy_components.Reap), "second", distribution="two", version="2.0"
        )
    assert str(caught.value).endswith(
        ": scorer 'reap' must have one provider. Got plugin 'second' (two 2.0) and, before it, plugin 'first' "
        "(one 1.0) instead. Uninstall or rename one."
    )
    assert registry.get("scorer", "reap").provenance.plugin == "first"


def test_the_same_name_may_serve_two_kinds() -> None:
    @dataclass(frozen=True)
    class Report:
        name: ClassVar[str] = "reap"
        filename: ClassVar[str] = "x"

        def render(self, run: Any) -> Any: ...

    registry = Registry()
    registry.register(plugin_of("dernkit_scorers", toy_components.Reap), "one")
    registry.register(plugin_of("dernkit_reports", Report), "two")
    assert [component.kind for component in registry.components()] == ["scorer", "report"]


def test_an_unknown_hook_is_refused_with_a_hint() -> None:
    with pytest.raises(PluginError) as caught:
        Registry().register(plugin_of("dernkit_scorer", toy_components.Reap), "mine")
    assert "unknown hook 'dernkit_scorer'" in str(caught.value)
    assert "Did you mean 'dernkit_scorers'?" in str(caught.value)


def test_an_unknown_name_says_what_was_meant_and_what_is_installed() -> None:
    with pytest.raises(RecipeError) as caught:
        toy_registry().get("scorer", "reep")
    assert str(caught.value) == "unknown scorer 'reep'. Did you mean 'reap'? Installed: gate-mass, reap, weights."
    with pytest.raises(RecipeError, match=r"^unknown adapter 'x'\. Installed: none\.$"):
        toy_registry().get("adapter", "x")


def test_a_component_knows_its_options_and_where_it_comes_from() -> None:
    component = toy_registry().get("assigner", "affinity")
    assert [option.name for option in component.options] == ["similarity", "threshold", "quantile"]
    assert component.provenance == provenance_of(toy_components.Affinity, Origin("toys", "local", "0"))
    assert component.provenance.file == toy_components.__file__
    assert toy_registry().get("scorer", "gate-mass").summary == "Total router weight."
    assert toy_registry().get("scorer", "weights").option("power").summary == "Exponent of the norm."


def test_optional_literals_and_bounds_outside_an_optional_are_understood() -> None:
    @dataclass(frozen=True)
    class Scorer:
        name: ClassVar[str] = "s"
        requires: ClassVar[frozenset[str]] = frozenset()
        mode: Literal["a", 1] | None = None
        power: Annotated[int | None, Interval(gt=0, lt=3)] = None
        score = toy_components.Reap.score

    registry = Registry()
    registry.register(plugin_of("dernkit_scorers", Scorer), "mine")
    mode, power = (registry.get("scorer", "s").option(name).shape for name in ("mode", "power"))
    assert (mode.parse("a", Path()), power.parse(2, Path()), power.parse(None, Path())) == ("a", 2, None)
    for shape, value, sentence in (
        (mode, True, "must be one of a, 1. Got true instead."),
        (power, 3, "must be above 0 and below 3. Got 3 instead."),
    ):
        with pytest.raises(ValueError, match=sentence):
            shape.parse(value, Path())


def test_all_builtins_register_and_come_from_this_distribution() -> None:
    registry = Registry.load(entry_points=False)
    components = list(registry.components())
    assert {component.provenance.plugin for component in components} == set(BUILTINS)
    assert {component.provenance.version for component in components} == {metadata.version("dernkit")}
    assert all(component.summary and component.provenance.line for component in components)
    assert registry.problems == []


def test_a_broken_plugin_stops_no_other_and_is_named_where_a_name_is_unknown(installed: Install) -> None:
    installed("a-import", "import nothing_of_this_name")
    installed("b-exit", "raise SystemExit(3)")
    installed("c-raises", "from dernkit.api import hookimpl\n@hookimpl\ndef dernkit_scorers():\n    1 / 0\n")
    installed("d-none", "from dernkit.api import hookimpl\n@hookimpl\ndef dernkit_scorers():\n    pass\n")
    installed("e-class", PLUGIN.format(name="Bad Name"))
    installed("f-collides", PLUGIN.format(name="reap"))
    installed("g-good", PLUGIN.format(name="good"))
    registry = Registry.load()
    ours = [str(problem) for problem in registry.problems if "3.1)" in str(problem)]
    assert [text.split("(")[1].split(" ")[0] for text in ours] == [
        "a-import", "b-exit", "c-raises", "d-none", "e-class", "f-collides",
    ]  # fmt: skip
    assert ours[0] == (
        "plugin 'a-import-plugin' (a-import 3.1) must be importable. "
        "Got ModuleNotFoundError: No module named 'nothing_of_this_name' instead."
    )
    assert "must return classes from dernkit_scorers(). Got ZeroDivisionError: division by zero instead." in ours[2]
    assert "Got TypeError: NoneType is not a list instead." in ours[3]
    assert registry.get("scorer", "reap").provenance.distribution == "dernkit"
    good = registry.get("scorer", "good").provenance
    assert (good.plugin, good.distribution, good.version) == ("g-good-plugin", "g-good", "3.1")
    with pytest.raises(RecipeError) as caught:
        registry.get("scorer", "output-energy-x")
    assert f"Failed to load: {ours[0]}" in str(caught.value)
