"""Published checkpoints and what dernkit makes of them, each made once."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

from dernkit.registry import Registry
from dernkit.testing.checkpoints import tokens
from tests.clients.client import Client
from tests.clients.families4 import FAMILIES4
from tests.laws.pipeline import DERN, recipe, run
from tests.unit.workbench import dernkit, succeeded

ROOT = Path(__file__).parents[2]
TESTBEDS = ROOT / "benchmarks/testbeds"
BUNDLED = "bundled mixtral"
TOKENIZER = ("tokenizer.json", "tokenizer_config.json")
AS_LLAMA_CPP_KNOWS: dict[str, dict[str, Any]] = {
    "olmoe": {"num_key_value_heads": 4},
    "qwen3_moe": {"mlp_only_layers": ()},
}
"""It has only what the published models have: as many heads for keys as for queries, and no dense layer."""
_MOVED: dict[str, Any] = {"assign": {**DERN, "quantile": 0.5}, "router": "additive"}
STAGES: dict[str, dict[str, Any]] = {
    "pruned": {},
    "DERN": _MOVED,
    "wider": {**_MOVED, "merge": "concatenate", "width": 96},
    "narrower": {**_MOVED, "width": 16},
}
"""Recipes that run through the stages, on models without a tokenizer."""
SHIPPED = {
    "pruned": ("prune-gate-mass.yaml",),
    "DERN": ("dern.yaml", "plan.assign.threshold=0.3"),
    "wider": ("dern-concat.yaml", "plan.assign.threshold=0.3"),
}
"""Recipes of the repository and settings under which neurons of random experts move too."""


class Bench:
    """Checkpoints below ``root``; those that no client wrote yet are written by transformers 4."""

    def __init__(self, root: Path, transformers4: Client) -> None:
        self.root, self.transformers4 = root, transformers4

    @functools.cache
    def published(self, family: str, **fields: Any) -> Path:
        """A random checkpoint of a family as transformers 4 writes it, or the bundled model."""
        folder = self.root / "-".join(["published", family, *fields])
        if family == BUNDLED:
            return shutil.copytree(TESTBEDS / "mixtral/model", folder)
        row = FAMILIES4[family]
        classes = {"config": f"{row.classes}Config", "model": f"{row.classes}{row.model}"}
        self.transformers4.call("save", folder=str(folder), fields={**row.fields, **fields}, **classes)
        return folder

    @functools.cache
    def staged(self, family: str, kind: str) -> Path:
        """What the stages make of a family."""
        folder, out = self.published(family), self.root / f"{kind}-{family}"
        run(folder, out, recipe(Registry.load(entry_points=False), **STAGES[kind]), tokens(4, 16))
        return out

    @functools.cache
    def with_tokenizer(self, family: str) -> Path:
        """A published checkpoint with the bundled model's vocabulary and tokenizer."""
        if family == BUNDLED:
            return self.published(family)
        folder = self.published(family, vocab_size=4096, **AS_LLAMA_CPP_KNOWS.get(family, {}))
        for name in TOKENIZER:
            shutil.copyfile(TESTBEDS / "mixtral/model" / name, folder / name)
        return folder

    @functools.cache
    def made(self, family: str, kind: str) -> Path:
        """The source itself, or what `dernkit run` makes of it with a recipe of the repository."""
        source = self.with_tokenizer(family)
        if kind == "source":
            return source
        file, *settings = SHIPPED[kind]
        settings += [f"calibrate.source.path={TESTBEDS / 'calibration.txt'}", "calibrate.sequences=4"]
        options = [word for setting in [*settings, "calibrate.length=64"] for word in ("--set", setting)]
        out = self.root / f"{kind}-{family}-run"
        succeeded(dernkit("run", str(ROOT / "recipes" / file), "--model", str(source), "--out", str(out), *options))
        return out / "model"

    def gguf(self, family: str, kind: str) -> Path:
        """The same as a GGUF file."""
        out = self.root / f"{kind}-{family}.gguf"
        self.transformers4.call("to_gguf", folder=str(self.made(family, kind)), out=str(out))
        return out


def model5(folder: Path) -> Any:
    """The checkpoint in this environment's transformers, or a plugin's class, in float32; every tensor must fit."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    load = getattr(transformers, architecture, transformers.AutoModelForCausalLM).from_pretrained
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


def logits5(folder: Path, ids: torch.Tensor) -> np.ndarray:
    """Its logits."""
    with torch.no_grad():
        return model5(folder)(ids).logits.numpy()


def greedy5(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """``count`` tokens after each prompt, the likeliest each time, end of text left out."""
    model, settings = model5(folder), {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}
    return [model.generate(torch.tensor([prompt]), **settings)[0, len(prompt) :].tolist() for prompt in prompts]


def logits_of(client: Client, folder: Path, ids: torch.Tensor, out: Path) -> np.ndarray:
    """A client's logits; every tensor must fit."""
    misfits = client.call("logits", folder=str(folder), ids=ids.tolist(), out=str(out))
    assert not misfits, misfits
    return np.load(out)
