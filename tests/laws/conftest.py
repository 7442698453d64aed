"""`make record-families`: what the laws on every family gave, for docs/reference/architectures.md."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from pathlib import Path

import pytest

RECORD = os.environ.get("DERNKIT_FAMILIES_RECORD")
_CASE = re.compile(r"test_every_family\.py::test_(\w+)\[([\w.]+)")
_seen: dict[str, dict[str, str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the outcome by family and law (xdist's controller sees those of all workers)."""
    case = _CASE.search(report.nodeid)
    if RECORD and case and (report.when == "call" or report.failed):
        said = dict(report.user_properties).get("sentence", report.outcome)
        _seen.setdefault(case.group(2), {})[case.group(1)] = str(said)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Write all outcomes with the machine's class and the commit."""
    if not RECORD or not _seen or hasattr(session.config, "workerinput"):
        return
    describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    machine = f"{len(os.sched_getaffinity(0))} {platform.machine()} cores"
    data = {"machine": machine, "commit": commit.strip(), "families": dict(sorted(_seen.items()))}
    (session.config.rootpath / RECORD).write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
