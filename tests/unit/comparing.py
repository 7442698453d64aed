"""Two tiny models, texts and recipes in one folder, a bench that compares them, and `dernkit compare` on it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml

from dernkit.compare.bench import Bench, load_bench
from dernkit.compare.engine import Comparison
from dernkit.progress import Silent
from dernkit.registry import Registry
from dernkit.testing.checkpoints import save_tiny
from tests.unit.workbench import TEXT, hashes, save_tokenizer

PRUNE: dict[str, Any] = {
    "dernkit": 1,
    "calibrate": {"source": {"use": "text-file", "path": "nowhere.txt"}, "sequences": 1, "length": 2},
    "plan": {"keep": 0.25, "score": {"use": "gate-mass"}},
    "apply": {},
}
DERN: dict[str, Any] = {
    **PRUNE,
    "seed": 7,
    "plan": {**PRUNE["plan"], "assign": {"use": "affinity", "similarity": {"use": "cosine"}, "quantile": 0.5}},
    "apply": {"merge": {"use": "spherical-kmeans"}, "router": {"use": "additive"}},
}
SEQUENTIAL = {**PRUNE, "calibrate": {**PRUNE["calibrate"], "sequential": True}, "plan": {"score": {"use": "reap"}}}
TEXTS = {"use": "perplexity", "path": "heldout", "length": 32}


class Comparing:
    """A bench of two models, two recipes and two seeds in ``bench.yaml``; results go to ``out``."""

    def __init__(self, root: Path) -> None:
        self.root, self.file, self.out = root, root / "bench.yaml", root / "out"
        save_tiny(root / "mixtral", "mixtral", num_hidden_layers=2)
        save_tiny(root / "qwen", "qwen2_moe", num_hidden_layers=2, dtype=torch.bfloat16)
        for name in ("mixtral", "qwen"):
            save_tokenizer(root / name)
        (root / "calib.txt").write_text(TEXT)
        (root / "heldout").mkdir()
        for name, start in (("one", 0), ("two", 300)):
            (root / "heldout" / f"{name}.txt").write_text(TEXT[start : start + 300])
        for name, recipe in (("prune", PRUNE), ("dern", DERN), ("sequential", SEQUENTIAL)):
            (root / f"{name}.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        self.data: dict[str, Any] = {
            "dernkit": 1,
            "models": {"mixtral": {"path": "mixtral"}, "qwen": {"path": "qwen"}},
            "calibration": {
                "mixed": {"source": {"use": "text-file", "path": "calib.txt"}, "sequences": 4, "length": 16}
            },
            "seeds": [0, 1],
            "keep": [0.5],
            "recipes": {"prune": "prune.yaml", "dern": "dern.yaml"},
            "evaluate": [TEXTS, {**TEXTS, "use": "fidelity"}],
            "baseline": "prune",
            "metric": "perplexity/bits_per_byte",
        }
        self.write()

    def write(self, **changes: Any) -> None:
        """Write the bench with other sections; None leaves one out."""
        data = {name: value for name, value in (self.data | changes).items() if value is not None}
        self.file.write_text(yaml.safe_dump(data, sort_keys=False))

    def bench(self, registry: Registry, *overrides: str) -> Bench:
        """The bench, bound."""
        return load_bench(self.file, registry, overrides)

    def compare(self, registry: Registry, *, jobs: int = 1, checkpoints: bool = False) -> Path:
        """A comparison that comes to its end."""
        work = Comparison(self.bench(registry), self.out, registry, Silent(), jobs=jobs, checkpoints=checkpoints)
        return work.execute()

    def results(self) -> dict[str, str]:
        """All results; times are none of them."""
        return {name: value for name, value in hashes(self.out).items() if name.startswith(("results", "stability."))}
