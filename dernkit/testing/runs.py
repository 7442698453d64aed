"""One real run on a tiny model, for the laws of reports and evaluators: what it is about, and every fact of it."""

from __future__ import annotations

import copy
import functools
import random
import tempfile
from pathlib import Path
from typing import Any

from dernkit.api import Subject
from dernkit.gather import gather
from dernkit.models.source import open_source
from dernkit.progress import Silent
from dernkit.recipe import bind_recipe
from dernkit.registry import Registry
from dernkit.run import Run
from dernkit.testing.checkpoints import save_tiny, tiny_model, tiny_tokenizer

NAME = "tiny-mixtral"
_DICE = random.Random(0)
TEXT = " ".join("".join(_DICE.choices("abcdefghij", k=4)) for _ in range(200))


def subject() -> Subject:
    """A tiny model in eval mode with its tokenizer, and another one as its original; new at each call."""
    models = [tiny_model("mixtral", num_hidden_layers=2, seed=seed) for seed in (0, 1)]
    original = Subject(models[1], tiny_tokenizer(), Path(NAME))
    return Subject(models[0], original.tokenizer, Path(NAME), lambda: original)


def facts() -> dict[str, Any]:
    """What reports are given: a run that prunes, evaluated before and after. A copy at each call."""
    return copy.deepcopy(_facts())


@functools.cache
def _facts() -> dict[str, Any]:
    registry = Registry.load(entry_points=False)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        source, text = base / NAME, base / "text.txt"
        save_tiny(source, "mixtral", num_hidden_layers=2)
        tiny_tokenizer().save_pretrained(source)
        text.write_text(TEXT, encoding="utf-8")
        recipe = bind_recipe(
            {
                "dernkit": 1,
                "calibrate": {"source": {"use": "text-file", "path": str(text)}, "sequences": 4, "length": 16},
                "plan": {"keep": 0.5, "score": {"use": "gate-mass"}},
                "apply": {},
                "evaluate": [{"use": "perplexity", "path": str(text), "length": 32}],
            },
            registry,
        )
        out = base / "out"
        Run(recipe, NAME, source, out, registry, Silent()).execute()
        adapters = [component.cls() for component in registry.components("adapter")]
        return gather(out, open_source(source, adapters), NAME, recipe)
