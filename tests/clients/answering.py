"""The client's side of tests/clients/client.py: requests are JSON lines on standard input, answers on standard output.

Runs in the environment of a client, which has neither dernkit nor pytest: standard library only.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any


def answer(**functions: Callable[..., Any]) -> None:
    """Call the function that each request names, until standard input ends; what libraries print goes elsewhere."""
    with os.fdopen(os.dup(1), "w") as answers:
        os.dup2(2, 1)
        for line in sys.stdin:
            request = json.loads(line)
            try:
                reply = {"value": functions[request.pop("call")](**request)}
            except Exception:  # whatever the client raises is the answer
                reply = {"error": traceback.format_exc()}
            print(json.dumps(reply), file=answers, flush=True)
