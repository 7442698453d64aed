"""What a plugin's modules import of dernkit: public modules only, as the others change without notice.

Read from their source, so that imports inside functions count as well. The plugin's module is read, and of its package
what that module imports, and so on; a package's tests are not reached. Imports for type checkers do not count, and what
is looked up at run time (`importlib`, attributes of `dernkit`) is not seen.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

PUBLIC = ("dernkit.api", "dernkit.errors", "dernkit.kernel", "dernkit.architecture", "dernkit.testing")
"""What plugins may import besides the names of `dernkit` itself; submodules of these are public, too."""

_HOMES = ("api", "architecture", "__init__")
"""Where a name that is taken from a private module may be found."""


@dataclass(frozen=True, slots=True)
class PrivateImport:
    """An import that a plugin must not have."""

    file: Path
    line: int
    module: str
    names: tuple[str, ...]

    @property
    def fix(self) -> str:
        """Where the names are found instead, if they all are in one public module."""
        for home in _HOMES:
            public = "dernkit" if home == "__init__" else f"dernkit.{home}"
            if self.names and set(self.names) <= _exported(home):
                return f"Import {', '.join(self.names)} from {public}."
        return f"Import from {', '.join(PUBLIC)} only."


def private_imports(plugin: Any) -> Iterator[PrivateImport]:
    """Every import of a private module of dernkit by a plugin's modules, in the order in which they are reached."""
    first = plugin.__name__ if isinstance(plugin, ModuleType) else type(plugin).__module__
    top = first.split(".")[0]
    waiting: list[str] = [] if top == "dernkit" else [first]
    met: set[str] = set()
    while waiting:
        name = waiting.pop(0)
        file = None if name in met else _file_of(name, top)
        met.add(name)
        if file is None:
            continue
        waiting += [name.rpartition(".")[0]]  # imported before it
        for node in _imports(ast.parse(file.read_bytes())):
            for imported, names in _modules(node, name, package=file.name == "__init__.py"):
                if _is_private(imported, names):
                    yield PrivateImport(file, node.lineno, imported, names)
                elif imported.split(".")[0] == top:
                    waiting += [imported, *(f"{imported}.{part}" for part in names)]


def _is_private(module: str, names: tuple[str, ...]) -> bool:
    if module == "dernkit":
        public = {name.removeprefix("dernkit.") for name in PUBLIC} | _exported("__init__") | {"*"}
        return not set(names) <= public
    return module.startswith("dernkit.") and not any(f"{module}.".startswith(f"{name}.") for name in PUBLIC)


def _imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements at any depth, but for those under ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node
        elif isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            yield from _imports(ast.Module(node.orelse, []))
        else:
            yield from _imports(node)


def _modules(
    node: ast.Import | ast.ImportFrom, importer: str, *, package: bool
) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The absolute names of the modules that a statement imports, with the names that it takes from each."""
    if isinstance(node, ast.Import):
        yield from ((alias.name, ()) for alias in node.names)
        return
    base = node.module or ""
    if node.level:
        parents = importer.split(".")
        parents = parents[: len(parents) - node.level + package]
        base = ".".join([*parents, base] if base else parents)
    yield base, tuple(alias.name for alias in node.names)


def _file_of(module: str, top: str) -> Path | None:
    """Source of a module below a package that is imported, found without running anything."""
    root = sys.modules.get(top)
    if module == top:
        file = getattr(root, "__file__", None)
        return Path(file) if file and file.endswith(".py") and Path(file).exists() else None
    parts = module.split(".")[1:]
    for folder in getattr(root, "__path__", ()):
        below = Path(folder, *parts)
        for file in (below.with_name(f"{below.name}.py"), below / "__init__.py"):
            if file.exists():
                return file
    return None


def _exported(module: str) -> frozenset[str]:
    """``__all__`` of a module of dernkit, without importing it."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_bytes())
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id="__all__")], value=value):
                return frozenset(ast.literal_eval(value))
    return frozenset()
