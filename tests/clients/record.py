"""What the clients' tests saw, for docs/reference/clients.md."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

RECORD = "DERNKIT_CLIENTS_RECORD"
"""Environment variable: the file to which a run of these tests writes its figures."""
LOGITS = "largest difference of a logit to transformers, float32"
RELATIVE = "largest difference of a logit to transformers 5, relative to the largest logit, float32"


@dataclass
class Record:
    """Figures by client, comparison, model and checkpoint."""

    figures: dict[tuple[str, str], dict[str, dict[str, str]]] = field(default_factory=dict)

    def note(self, client: str, compared: str, model: str, checkpoint: str, figure: float | str) -> None:
        """Keep one figure: a largest difference, or words."""
        shown = figure if isinstance(figure, str) else f"{figure:.1e}"
        self.figures.setdefault((client, compared), {}).setdefault(model, {})[checkpoint] = shown

    def write(self, file: Path) -> None:
        """Write all figures with the machine's class and the commit."""
        describe = ["git", "describe", "--always", "--dirty", "--exclude=*"]
        commit = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
        clients = [
            {"client": client, "compared": compared, "models": models}
            for (client, compared), models in sorted(self.figures.items())
        ]
        data = {"machine": f"{len(os.sched_getaffinity(0))} {platform.machine()} cores", "commit": commit.strip()}
        file.write_text(json.dumps({**data, "clients": clients}, indent=1) + "\n", encoding="utf-8")
