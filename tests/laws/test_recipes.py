"""Every recipe that is shipped runs from a checkpoint to a checkpoint that stock transformers loads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from tests.unit.workbench import Workbench, dernkit, succeeded

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
WITHOUT_A_PLACE_IN_STOCK = "Loads with dernkit.load_model only"
"""How the report of a result with other counts in every layer begins."""


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_runs(path: Path, tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    text = re.sub(r"sequences: \d+", "sequences: 4", path.read_text(encoding="utf-8"))
    text = re.sub(r"length: \d+", "length: 16", text).replace("calibration.txt", "calib.txt")
    bench.recipe.write_text(text, encoding="utf-8")
    output = bench.finish()
    report = (bench.out / "report.md").read_text(encoding="utf-8")
    if report.startswith(WITHOUT_A_PLACE_IN_STOCK):
        import dernkit as package

        model: Any = package.load_model(output)
    else:
        model = AutoModelForCausalLM.from_pretrained(output)
    kept = yaml.safe_load(text)["plan"]["keep"]
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    before = sum(
        p.numel() for n, p in AutoModelForCausalLM.from_pretrained(bench.model).named_parameters() if ".experts." in n
    )
    widened = "concatenate" in text
    assert experts <= before * (1 if widened else kept + 0.13), "the experts must take less room"
    logits = model.eval()(torch.arange(3, 20)[None]).logits
    assert bool(logits.isfinite().all())
    again = succeeded(dernkit("validate", str(bench.recipe)))
    assert "# valid" in again.stdout
