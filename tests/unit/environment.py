"""Environments in which a plugin is installed as a stranger would."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    """What a command prints; it must succeed."""
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def with_plugin(folder: Path, plugin: Path) -> Path:
    """Python of a new environment that sees the running one's packages and has the plugin installed on top."""
    venv.create(folder / "env", symlinks=True)
    python = folder / "env/bin/python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (purelib / "running.pth").write_text(f"import site; site.addsitedir({sysconfig.get_path('purelib')!r})\n")
    copy = shutil.copytree(plugin, folder / plugin.name, ignore=shutil.ignore_patterns("__pycache__"))
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    run(python, "-m", "pip", "install", *offline, copy, cwd=folder)
    return python


@contextmanager
def imported(place: Path) -> Iterator[ModuleType]:
    """The module or package at ``place`` (without .py), imported, and forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(place.parent))
    try:
        yield importlib.import_module(place.name)
    finally:
        sys.path.remove(str(place.parent))
        for name in set(sys.modules) - before:
            if name.split(".")[0] == place.name:
                del sys.modules[name]
