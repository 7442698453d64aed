"""The folder that the documentation's commands run in: what its reader would have, made small.

`my-moe` is a random Mixtral with a tokenizer of characters, `my-fp8-moe` the same in FP8, `my-text.txt` and
`heldout.txt` are text, `recipes` are the shipped ones with less calibration, and `benchmarks/testbeds` has the bundled
model and the beginnings of its texts.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import torch

from dernkit.testing.checkpoints import save_tiny, tiny_tokenizer
from dernkit.testing.quantised import quantise_fp8
from tests.docs.markdown import ROOT

TESTBEDS = ROOT / "benchmarks/testbeds"
BUNDLED = TESTBEDS / "mixtral/model"


def make(folder: Path) -> None:
    """Fill an empty folder."""
    save_tiny(folder / "my-moe", "mixtral", dtype=None)
    tiny_tokenizer().save_pretrained(folder / "my-moe")
    save_tiny(folder / "my-fp8-moe", "mixtral", dtype=torch.bfloat16)
    tiny_tokenizer().save_pretrained(folder / "my-fp8-moe")
    quantise_fp8(folder / "my-fp8-moe", 8, 8)
    text = (TESTBEDS / "calibration.txt").read_text(encoding="utf-8")
    (folder / "my-text.txt").write_text(text[:20_000], encoding="utf-8")
    (folder / "heldout.txt").write_text(text[20_000:24_000], encoding="utf-8")
    shutil.copytree(ROOT / "recipes", folder / "recipes")
    for recipe in (folder / "recipes").glob("*.yaml"):
        smaller = re.sub(r"sequences: \d+", "sequences: 8", recipe.read_text(encoding="utf-8"))
        recipe.write_text(re.sub(r"length: \d+", "length: 64", smaller), encoding="utf-8")
    _testbeds(folder / "benchmarks/testbeds")


def _testbeds(folder: Path) -> None:
    (folder / "heldout").mkdir(parents=True)
    (folder / "mixtral").mkdir()
    (folder / "mixtral/model").symlink_to(BUNDLED)
    shutil.copyfile(TESTBEDS / "calibration.txt", folder / "calibration.txt")
    for text in (TESTBEDS / "heldout").glob("*.txt"):
        (folder / "heldout" / text.name).write_text(text.read_text(encoding="utf-8")[:4000], encoding="utf-8")
