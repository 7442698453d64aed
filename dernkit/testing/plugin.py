"""`dernkit check`: find a plugin by whatever name its author has for it, and hold all its components to the laws."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from dernkit.admission import broken, check_imports
from dernkit.components import Component, Origin
from dernkit.errors import ContractError, PluginError
from dernkit.registry import BUILTINS, GROUP, Registry
from dernkit.sentences import did_you_mean
from dernkit.testing.kit import Expected, check_expected, checks_of, has_defaults, why_expected
from dernkit.testing.law import Check, kind_of, label


@dataclass(frozen=True, slots=True)
class Found:
    """A plugin's module."""

    module: Any
    origin: Origin


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one law says about one component."""

    component: str
    kind: str
    check: Check
    outcome: str
    """``ok``, ``expected`` (broken as the plugin says) or ``broken``."""
    sentence: str = ""


@dataclass(frozen=True, slots=True)
class Conformance:
    """All verdicts on a plugin, and the components on which there are none."""

    verdicts: list[Verdict]
    unchecked: list[str]

    @property
    def broken(self) -> list[Verdict]:
        """Laws that are broken, or kept where the plugin says that they are broken."""
        return [verdict for verdict in self.verdicts if verdict.outcome == "broken"]


def check_plugin(name: str) -> Conformance:
    """Every law on every component of the plugins that ``name`` means, with default options and its own examples.

    A plugin's module may have two functions for the kit: ``dernkit_examples()`` returns more instances, as of
    components whose options have no defaults; ``dernkit_expected_failures()`` returns laws that are broken on purpose.

    Raises:
        PluginError: there is no such plugin, or it cannot be registered.
    """
    verdicts, unchecked = [], []
    for found in find(name):
        components, without = _instances(found)
        expected = _asked(found, "dernkit_expected_failures", {})
        check_expected(components, expected)
        verdicts += [_verdict(each, check, expected) for each in components for check in checks_of(each)]
        unchecked += without
    return Conformance(verdicts, unchecked)


def find(name: str) -> list[Found]:
    """The plugins of a distribution, or of an entry point, a folder with a pyproject.toml, a file, or a module.

    Raises:
        PluginError: none of these has that name.
    """
    if name == "dernkit":
        origin = ("dernkit", metadata.version("dernkit"))
        return [Found(importlib.import_module(module), Origin(module, *origin)) for module in BUILTINS]
    points = list(metadata.entry_points(group=GROUP))
    named = [point for point in points if name in _names(point)]
    if named:
        return [_loaded(point.value, Origin(point.name, *_distribution(point))) for point in named]
    path = Path(name)
    if path.is_dir() and (path / "pyproject.toml").is_file():
        return list(_of_project(path))
    if path.suffix == ".py" and path.is_file():
        sys.path.insert(0, str(path.resolve().parent))
        return [_loaded(path.stem, Origin(path.stem, "local", "0"))]
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    if all(part.isidentifier() for part in name.split(".")) and _is_module(name):
        return [_loaded(name, Origin(name, "local", "0"))]
    known = {"dernkit", *(word for point in points for word in _names(point))}
    hint = did_you_mean(name, known) or f"Installed: {', '.join(sorted(known))}."
    raise PluginError(
        f"check: must be given an installed distribution or entry point, a module, or a plugin's folder. "
        f"Got '{name}' instead. {hint}"
    )


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _of_project(folder: Path) -> Iterator[Found]:
    """The entry points that a folder's project file declares, read from their sources."""
    try:
        project = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8")).get("project", {})
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise PluginError(f"{folder / 'pyproject.toml'}: must be TOML. Got '{error}' instead. Correct it.") from None
    points = project.get("entry-points", {}).get(GROUP, {})
    if not points:
        raise PluginError(
            f"{folder / 'pyproject.toml'}: must declare a plugin. Got no [project.entry-points.{GROUP}] instead. "
            f"Add it, with a line such as: my-plugin = 'my_module'"
        )
    sys.path[:0] = [str((folder / below).resolve()) for below in ("src", ".")]
    importlib.invalidate_caches()
    for point, value in points.items():
        origin = Origin(point, project.get("name", "local"), project.get("version", "0"))
        yield _loaded(value, origin)


def _loaded(value: str, origin: Origin) -> Found:
    try:
        plugin = metadata.EntryPoint(origin.plugin, value, GROUP).load()
    except (Exception, SystemExit) as error:
        raise broken(origin, "be importable", error) from error
    check_imports(origin, plugin)
    return Found(plugin, origin)


def _instances(found: Found) -> tuple[list[Any], list[str]]:
    """A plugin's components with default options, its examples, and why the others are not checked."""
    components = _registered(found)
    given = [component.cls() for component in components if has_defaults(component.cls)]
    examples = list(_asked(found, "dernkit_examples", []))
    for example in examples:
        kind_of(example)
    given += [example for example in examples if example not in given]
    shown = {type(instance) for instance in given}
    without = [_reason(component) for component in components if component.cls not in shown]
    return given, without


def _registered(found: Found) -> list[Component]:
    is_own = found.origin.distribution == "dernkit" and found.origin.plugin in BUILTINS
    registry = Registry() if is_own else Registry.load(entry_points=False)
    before = set(map(_key, registry.components()))
    origin = found.origin
    registry.register(found.module, origin.plugin, distribution=origin.distribution, version=origin.version)
    return [component for component in registry.components() if _key(component) not in before]


def _key(component: Component) -> tuple[str, str]:
    return component.kind, component.name


def _reason(component: Component) -> str:
    needed = ", ".join(option.name for option in component.options if option.required)
    return f"{component.kind} '{component.name}': not checked, as {needed} must be given; see dernkit_examples"


def _asked(found: Found, function: str, otherwise: Any) -> Any:
    """What a function of the plugin's module returns, where there is one."""
    provide = getattr(found.module, function, None)
    if provide is None:
        return otherwise
    try:
        return provide()
    except Exception as error:
        raise broken(found.origin, f"return from {function}()", error) from error


def _verdict(component: Any, check: Check, expected: Expected) -> Verdict:
    why = why_expected(component, check, expected)
    about = label(component), check.kind, check
    try:
        check(component)
    except ContractError as error:
        return Verdict(*about, "broken", str(error)) if why is None else Verdict(*about, "expected", why)
    if why is None:
        return Verdict(*about, "ok")
    where = f"{check.kind} '{component.name}', law {check.id}"
    return Verdict(*about, "broken", f"{where}: must be broken, as is expected ({why}). Got it kept instead. Drop it.")


def _names(point: metadata.EntryPoint) -> tuple[str, ...]:
    return (point.name, _distribution(point)[0], point.module)


def _distribution(point: metadata.EntryPoint) -> tuple[str, str]:
    return ("local", "0") if point.dist is None else (point.dist.name, point.dist.version)
