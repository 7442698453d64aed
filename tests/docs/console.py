"""Runs ``console`` blocks of the documentation and compares what they print with what the page says they print.

Only ``dernkit``, a few commands that look at files and ``pip install`` of a local folder are run; ``make`` and the like
are not. What pip installs goes into a folder of the working directory, which must be on ``sys.path``. In the expected
output a line ``…`` stands for any number of lines and a ``…`` in a line for the rest of that line or a part of it;
decimal numbers (times, losses) need not agree.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

from dernkit.cli import main

LOOKED_AT_ONLY = ("cat", "head", "ls", "diff", "cp", "mkdir")
SITE = ".site"
NOT_RUN = ("make", "pip", "python", "python3", "git", "cd")

_DECIMAL = re.compile(r"[+-]?\d[\d,]*\.\d+")
_UNDER_WAY = re.compile(r"^.*, \d+ s left\n", re.MULTILINE)


def sessions(text: str) -> list[tuple[str, str]]:
    """The commands of a block, each with the output that the page shows for it."""
    found: list[tuple[str, str]] = []
    for line in text.replace("\\\n", " ").splitlines(keepends=True):
        if line.startswith("$ "):
            found.append((line[2:].strip(), ""))
        elif not found:
            raise AssertionError(f"a console block must begin with a '$ ' line. Got {line!r} instead.")
        else:
            found[-1] = (found[-1][0], found[-1][1] + line)
    return found


def check(command: str, expected: str) -> None:
    """Run one command in the working directory; a command without shown output must only succeed."""
    words = shlex.split(command)
    if words[:2] == ["pip", "install"] and words[2].startswith("./"):
        _install(words[2])
        return
    if words[0] in NOT_RUN:
        return
    status, printed = _dernkit(words[1:]) if words[0] == "dernkit" else _shell(words)
    if not expected:
        assert status == 0, f"$ {command}\n{printed}"
        return
    assert _pattern(expected).fullmatch(_comparable(printed)), f"$ {command}\nprints\n{printed}\nnot\n{expected}"


def _dernkit(arguments: list[str]) -> tuple[int, str]:
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            main.main(arguments, prog_name="dernkit")
        except SystemExit as end:
            return int(end.code or 0), stream.getvalue()
    return 0, stream.getvalue()


def _install(folder: str) -> None:
    """Offline, and without what is there already."""
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    status, printed = _shell_out([sys.executable, "-m", "pip", "install", *offline, "--target", SITE, folder])
    assert status == 0, printed
    importlib.invalidate_caches()


def _shell(words: list[str]) -> tuple[int, str]:
    assert words[0] in LOOKED_AT_ONLY, f"'{words[0]}' in a console block: add it to what is run or to what is not"
    return _shell_out(words)


def _shell_out(words: list[str]) -> tuple[int, str]:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def _comparable(text: str) -> str:
    """Without progress under way, with decimals made alike, and without the working directory."""
    text = _UNDER_WAY.sub("", text).replace(f"{Path.cwd()}/", "")
    return _DECIMAL.sub("#.#", text).rstrip() + "\n"


def _pattern(expected: str) -> re.Pattern[str]:
    parts = []
    for line in _comparable(expected).splitlines():
        any_lines = line.strip() == "…"
        parts.append(r"(?:.*\n)*?" if any_lines else re.escape(line.rstrip()).replace("…", ".*") + r"[ ]*\n")
    return re.compile("".join(parts))
