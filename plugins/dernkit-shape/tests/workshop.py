"""A tiny Mixtral with a tokenizer and a text, and the command line on it."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import yaml
from click.testing import CliRunner
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from dernkit.cli import main
from dernkit.testing.checkpoints import save_tiny

WORDS = ("<unk>", "<s>", "</s>", *(f"w{number}" for number in range(87)))


def recipe_with(path: Path, **plan: Any) -> dict[str, Any]:
    """A recipe that is shipped, with a short calibration and other keys in its plan."""
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    recipe["calibrate"] |= {"source": {"use": "text-file", "path": "calib.txt"}, "sequences": 4, "length": 16}
    recipe["plan"] |= plan
    return recipe


def result_of(folder: Path, recipe: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Runs a recipe in ``folder`` as the command does; the model that comes out and its plan."""
    save_tiny(folder / "source", "mixtral", num_hidden_layers=2)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder / "source")
    dice = random.Random(0)
    (folder / "calib.txt").write_text(" ".join(dice.choice(WORDS[3:]) for _ in range(200)))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    places = ("--model", folder / "source", "--out", folder / "out")
    done = CliRunner().invoke(main, ["run", str(folder / "recipe.yaml"), *map(str, places)])
    assert done.exit_code == 0, (done.output, done.stderr, done.exception)
    plan = json.loads((folder / "out/plan.json").read_text())
    return AutoModelForCausalLM.from_pretrained(folder / "out/model").eval(), plan
