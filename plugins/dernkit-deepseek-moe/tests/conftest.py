"""A tiny checkpoint in the published form with a tokenizer, a text and recipes, as the working directory."""

import os

os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

import json
import random
from pathlib import Path

import pytest
import torch
import yaml
from dernkit_deepseek_moe.testing import save_tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import dernkit

WORDS = ("<unk>", "<s>", "</s>", *(f"w{number}" for number in range(90)))

torch.set_num_threads(1)
dernkit.register_architectures()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`source`, `calib.txt`, and `recipe.yaml`, which keeps half of the experts by DERN and evaluates the result."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "source")
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    wrapped.save_pretrained(tmp_path / "source")
    dice = random.Random(0)
    (tmp_path / "calib.txt").write_text(" ".join(dice.choice(WORDS[3:]) for _ in range(400)))
    source = {"use": "text-file", "path": "calib.txt"}
    recipe = {
        "dernkit": 1,
        "calibrate": {"source": source, "sequences": 8, "length": 32, "batch_size": 2},
        "plan": {
            "keep": 0.5,
            "score": {"use": "gate-mass"},
            "assign": {"use": "affinity", "similarity": {"use": "cosine"}, "quantile": 0.5},
        },
        "apply": {"merge": {"use": "spherical-kmeans"}, "router": {"use": "additive"}},
        "evaluate": [{"use": "perplexity", "path": "calib.txt", "length": 32}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    prune = {**recipe, "plan": {"keep": 0.5, "score": {"use": "gate-mass"}}, "apply": {}, "evaluate": []}
    (tmp_path / "prune.yaml").write_text(yaml.safe_dump(prune))
    return tmp_path


@pytest.fixture
def config(work: Path) -> dict:
    """The source's config.json."""
    return json.loads((work / "source/config.json").read_text())
