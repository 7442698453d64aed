"""A program of somebody else in an environment of its own, and what the tests ask it."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


class Client:
    """A script of this folder that runs in another environment and answers calls."""

    def __init__(self, script: str, variable: str) -> None:
        python = interpreter(variable)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)
        self._process = subprocess.Popen(
            [python, HERE / script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.version: str = self.call("version")

    def call(self, function: str, **arguments: Any) -> Any:
        """What the script's ``function`` returns.

        Raises:
            AssertionError: with the client's own words, if it raises.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"call": function, **arguments}) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, f"{function}: the client must answer. Got an end with status {self._process.wait()} instead."
        reply = json.loads(answer)
        assert "error" not in reply, f"the client says:\n{reply['error']}"
        return reply["value"]

    def close(self) -> None:
        """Let it end."""
        self._process.communicate()


def interpreter(variable: str) -> Path:
    """The python of the environment that an environment variable names."""
    folder = os.environ.get(variable)
    assert folder, f"{variable} must name the environment of a client. Got nothing instead. Run `make test-clients`."
    python = Path(folder).absolute() / "bin/python"
    assert python.exists(), f"{variable} must name an environment. Got '{folder}' instead. Run `make test-clients`."
    return python
