"""A tiny checkpoint with a tokenizer, a text and a recipe in one folder, and the command line on them."""

from __future__ import annotations

import functools
import hashlib
import json
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dernkit.cli import main
from dernkit.registry import Registry
from dernkit.testing.checkpoints import save_tiny

_DICE = random.Random(0)
TEXT = " ".join(f"w{_DICE.randrange(80)}" for _ in range(200))
SHARDS = {"shard": "40KB"}
DERN = {
    "assign": {"use": "affinity", "similarity": {"use": "cosine"}, "quantile": 0.5},
    "merge": {"use": "spherical-kmeans"},
}
_PROGRESS = re.compile(r"\w+( \w+)?: [\d,]+ \w+ in [\d.]+ s$")
INDEX = "model.safetensors.index.json"


def save_tokenizer(folder: Path) -> None:
    """A word-level tokenizer of the tiny vocabulary."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator([TEXT], trainers.WordLevelTrainer(vocab_size=90, special_tokens=special))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(folder)


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder, by its relative name."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def edit_config(folder: Path, **fields: Any) -> None:
    """Change fields of config.json; None removes one."""
    edit_json(folder / "config.json", lambda config: config.update(fields))
    edit_json(folder / "config.json", lambda config: [config.pop(name) for name in fields if fields[name] is None])


def edit_json(file: Path, change: Callable[[Any], object]) -> None:
    """Change a JSON file in place."""
    data = json.loads(file.read_text())
    change(data)
    file.write_text(json.dumps(data, indent=2))


def edit_tensors(file: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change a safetensors file in place, metadata kept."""
    with safe_open(file, "pt") as stored:
        metadata = stored.metadata()
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (not a dict)
    change(tensors)
    save_file(tensors, file, metadata=metadata)


def put_value(file: Path, name: str, value: float) -> None:
    """Write one number into a tensor."""

    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[3] = value

    edit_tensors(file, change)


class Workbench:
    """A checkpoint in ``model``, a text, and a recipe that keeps half of the experts; results go to ``out``."""

    def __init__(self, root: Path, family: str = "mixtral", **options: Any) -> None:
        self.root, self.model, self.out = root, root / "source", root / "out"
        self.text, self.recipe = root / "calib.txt", root / "recipe.yaml"
        save_tiny(self.model, family, **{"num_hidden_layers": 2, **options})
        save_tokenizer(self.model)
        self.text.write_text(TEXT)
        self.write()

    def write(self, *, assign: Any = None, merge: Any = None, evaluate: Any = (), router: str = "slice") -> None:
        """Write the recipe; without ``assign`` and ``merge`` it prunes."""
        plan = {"keep": 0.5, "score": {"use": "gate-mass"}}
        apply: dict[str, Any] = {"router": {"use": router}}
        if assign is not None:
            plan, apply = plan | {"assign": assign}, apply | {"merge": merge}
        source = {"use": "text-file", "path": "calib.txt"}
        data = {
            "dernkit": 1,
            "calibrate": {"source": source, "sequences": 4, "length": 16},
            "plan": plan,
            "apply": apply,
            "evaluate": list(evaluate),
        }
        self.recipe.write_text(yaml.safe_dump(data, sort_keys=False))

    def run(self, *options: str) -> Result:
        """``dernkit run`` with ``--set`` options."""
        settings = [word for option in options for word in ("--set", option)]
        arguments = ["--model", str(self.model), "--out", str(self.out), *settings]
        return dernkit("run", str(self.recipe), *arguments)

    def finish(self, *options: str) -> Path:
        """A run that must succeed; returns the compressed model's folder."""
        succeeded(self.run(*options))
        return self.out / "model"

    def refusal(self, code: int, *options: str) -> str:
        """The sentence of a run that must be refused without a trace: sources stay, nothing half-made appears."""
        before, out = hashes(self.model), results(self.out)
        there = self.out.exists()
        result = self.run(*options)
        sentence = said(result, code)
        assert hashes(self.model) == before
        assert results(self.out) == out
        assert self.out.exists() == there
        return sentence


def stages(result: Result) -> list[str]:
    """The stages that a run worked on, from its lines of progress."""
    lines = succeeded(result).stderr.splitlines()
    return list(dict.fromkeys(re.split(r"[ :]", line)[0] for line in lines))


def succeeded(result: Result) -> Result:
    """The same result, after a look at how it ended."""
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.stderr
    return result


def results(out: Path) -> dict[str, str]:
    """Finished artifacts of a run directory."""
    places = ("model/", "stats.", "plan.", "eval.", "report.")
    return {name: value for name, value in hashes(out).items() if name.startswith(places)}


def is_said(sentence: str, expected: str) -> bool:
    """Whether they are equal, or, where the expected one ends with … (then come others' words), begin alike."""
    return sentence.startswith(expected[:-1]) if expected.endswith("…") else sentence == expected


def said(result: Result, code: int) -> str:
    """The one sentence of a refusal (progress may come before it), after a look at the exit code."""
    assert isinstance(result.exception, SystemExit), result.exception
    lines = [line for line in result.stderr.splitlines() if not _PROGRESS.match(line)]
    assert (result.exit_code, len(lines)) == (code, 1), result.stderr
    return lines[0]


@functools.cache
def _builtins() -> Registry:
    return Registry.load(entry_points=False)


def dernkit(*arguments: str) -> Result:
    """The console entry, without the plugins that happen to be installed."""
    with patch("dernkit.commands.options.registry", _builtins):
        return CliRunner().invoke(main, list(arguments))
