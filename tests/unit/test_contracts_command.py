"""An installed plugin that breaks its contract, through the command line: plugin, component, law and layer in one
sentence, the exit code of a broken contract, nothing half made; and the next run goes on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from transformers import AutoModelForCausalLM

import dernkit
from dernkit.api import ContractError
from dernkit.cli import main
from dernkit.registry import Registry
from tests.unit.installed import Install, installed
from tests.unit.workbench import DERN, Workbench, hashes, results, said, stages

__all__ = ["installed"]

SOURCE = """\
from dataclasses import dataclass, replace
from typing import ClassVar, Literal
import torch
from dernkit.api import Assignment, Match, Retention, hookimpl

Deed = Literal["right", "raise", "exit", "none", "numpy", "nan", "shape", "mutate", "undeclared"]

class Acting:
    def act(self, right, mutable, stats=None):
        if self.deed == "raise":
            raise KeyError("expert 3")
        if self.deed == "exit":
            raise SystemExit(0)
        if self.deed == "none":
            return None
        if self.deed == "numpy":
            return right.numpy()
        if self.deed == "nan":
            return right * float("nan")
        if self.deed == "shape":
            return right[..., :1]
        if self.deed == "mutate":
            mutable.mul_(2)
        if self.deed == "undeclared":
            return stats["reap_sum"]
        return right

@dataclass(frozen=True)
class Scorer(Acting):
    name: ClassVar[str] = "my-score"
    requires: ClassVar[frozenset[str]] = frozenset({"gate_sum"})
    deed: Deed = "right"
    def score(self, bank, stats):
        return self.act(stats["gate_sum"] + 0, stats["gate_sum"] if bank.dims.layer else torch.zeros(1), stats)

@dataclass(frozen=True)
class Merge(Acting):
    name: ClassVar[str] = "my-merge"
    requires: ClassVar[frozenset[str]] = frozenset()
    widens: ClassVar[bool] = False
    deed: Deed = "right"
    def merge(self, pool, width, rng):
        return self.act(pool.own + 0, pool.own, pool.stats)

@dataclass(frozen=True)
class Router(Acting):
    name: ClassVar[str] = "my-router"
    requires: ClassVar[frozenset[str]] = frozenset()
    deed: Deed = "right"
    def update(self, rows, plan, stats):
        return rows[plan.kept] if plan.layer == 0 else self.act(rows[plan.kept], plan.scores, stats)

@dataclass(frozen=True)
class Source(Acting):
    name: ClassVar[str] = "my-source"
    deed: Deed = "right"
    def tokens(self, tokenizer, sequences, length, rng):
        return self.act(torch.ones(sequences, length, dtype=torch.int64), torch.ones(1))

@dataclass(frozen=True)
class Evaluator(Acting):
    name: ClassVar[str] = "my-evaluator"
    deed: Deed = "right"
    def evaluate(self, subject):
        return {"loss": self.act(torch.ones(1), torch.ones(1)).item()}

@dataclass(frozen=True)
class Report(Acting):
    name: ClassVar[str] = "my-report"
    filename: ClassVar[str] = "report.txt"
    deed: Deed = "right"
    def render(self, run):
        return str(self.act(torch.ones(1), torch.ones(1)).item()) if self.deed != "none" else None

@hookimpl
def dernkit_scorers(): return [Scorer]
@hookimpl
def dernkit_merges(): return [Merge]
@hookimpl
def dernkit_routers(): return [Router]
@hookimpl
def dernkit_sources(): return [Source]
@hookimpl
def dernkit_evaluators(): return [Evaluator]
@hookimpl
def dernkit_reports(): return [Report]
"""

MINE = "plugin 'my-dist-plugin' (my-dist 3.1), "
CASES = {
    "plan.score={use: my-score, deed: mutate}": (
        "scorer 'my-score', layer 1: score must not change its input (law no_mutation). Got 'stats.gate_sum' changed "
        "instead. Fix the plugin."
    ),
    "plan.score={use: my-score, deed: raise}": (
        "scorer 'my-score', layer 0: score must raise nothing but a DernkitError (law no_exception). "
        "Got KeyError: 'expert 3' at my_dist.py:11 instead. Fix the plugin."
    ),
    "plan.score={use: my-score, deed: exit}": (
        "scorer 'my-score', layer 0: score must raise nothing but a DernkitError (law no_exception). "
        "Got SystemExit: 0 at my_dist.py:13 instead. Fix the plugin."
    ),
    "plan.score={use: my-score, deed: none}": (
        "scorer 'my-score', layer 0: score must be a float64 tensor of shape [8] (law type). Got nothing instead. "
        "Fix the plugin."
    ),
    "plan.score={use: my-score, deed: numpy}": (
        "scorer 'my-score', layer 0: score must be a float64 tensor of shape [8] (law type). Got a numpy ndarray "
        "instead. Fix the plugin."
    ),
    "plan.score={use: my-score, deed: nan}": (
        "scorer 'my-score', layer 0: score must be finite, also for an expert that saw no token (law finite). "
        "Got nan at [0] instead. Divide by no count, weight or norm of 0."
    ),
    "plan.score={use: my-score, deed: undeclared}": (
        "scorer 'my-score', layer 0: statistic 'reap_sum': must be declared in the component's `requires` to be "
        "collected. Got only gate_sum instead. Add it to `requires`."
    ),
    "apply.merge={use: my-merge, deed: shape}": (
        "merge 'my-merge', layer 0: segments of expert 0 must have the shape [up to 24, 3, 32] (law shape). "
        "Got [24, 3, 1] instead. Fix the plugin."
    ),
    "apply.merge={use: my-merge, deed: mutate}": (
        "merge 'my-merge', layer 0: merge must not change its input (law no_mutation). Got 'pool.own' changed "
        "instead. Fix the plugin."
    ),
    "apply.router={use: my-router, deed: nan}": (
        "router 'my-router', layer 1: rows must be finite, also for an expert that saw no token (law finite). "
        "Got nan at [0, 0] instead. Divide by no count, weight or norm of 0."
    ),
    "calibrate.source={use: my-source, deed: shape}": (
        "source 'my-source': tokens must be an int64 tensor of shape [4, 16] (law shape). Got int64 [4, 1] on cpu "
        "instead. Fix the plugin."
    ),
    "evaluate=[{use: my-evaluator, deed: raise}]": (
        "evaluator 'my-evaluator': evaluate must raise nothing but a DernkitError (law no_exception). "
        "Got KeyError: 'expert 3' at my_dist.py:11 instead. Fix the plugin."
    ),
    "report={use: my-report, deed: none}": (
        "report 'my-report': render must be a str (law type). Got nothing instead. Fix the plugin."
    ),
}
MADE = {
    "calibrate": set(),
    "plan": {"stats.safetensors"},
    "apply": {"stats.safetensors", "plan.json", "plan.safetensors"},
}
AFTER = {"calibrate": ["calibrate", "plan", "apply"], "plan": ["plan", "apply"], "apply": ["apply"]}


@pytest.fixture
def bench(installed: Install, tmp_path: Path) -> Iterator[Workbench]:
    installed("my-dist", SOURCE)
    made = Workbench(tmp_path)
    made.write(**DERN)
    yield made


def run(bench: Workbench, *settings: str) -> Result:
    """The command as it is, with all plugins that are installed."""
    options = [word for setting in settings for word in ("--set", setting)]
    return CliRunner().invoke(
        main, ["run", str(bench.recipe), "--model", str(bench.model), "--out", str(bench.out), *options]
    )


@pytest.mark.parametrize("setting", CASES)
def test_a_broken_contract_ends_the_run_with_one_sentence_and_nothing_half_made(bench: Workbench, setting: str) -> None:
    before = hashes(bench.model)
    assert said(run(bench, setting), 4) == MINE + CASES[setting]
    assert hashes(bench.model) == before
    stage = setting.split(".")[0].split("=")[0]
    made = results(bench.out)
    assert not any(name.startswith(("eval.", "report.")) for name in made)
    if stage in MADE:
        assert set(made) == MADE[stage]
    mended = setting.replace(setting[setting.index("deed: ") + 6 : setting.index("}")], "right")
    assert (bench.out / "model/config.json").exists() == (stage not in MADE)
    assert stages(run(bench, mended))[: len(AFTER.get(stage, []))] == AFTER.get(stage, [])
    assert (bench.out / "model/config.json").exists()


def test_the_same_recipe_with_a_plugin_that_keeps_its_contracts_runs(bench: Workbench) -> None:
    rights = [setting.replace(setting[setting.index("deed: ") + 6 : setting.index("}")], "right") for setting in CASES]
    result = run(bench, *rights)
    assert result.exit_code == 0, result.stderr
    assert (bench.out / "report.txt").read_text() == "1.0"


def test_eval_names_the_plugin_too(bench: Workbench) -> None:
    arguments = ["eval", str(bench.recipe), "--model", str(bench.model)]
    result = CliRunner().invoke(main, [*arguments, "--set", "evaluate=[{use: my-evaluator, deed: raise}]"])
    assert said(result, 4) == MINE + CASES["evaluate=[{use: my-evaluator, deed: raise}]"]


RECIPE: dict[str, Any] = {
    "dernkit": 1,
    "calibrate": {"source": {"use": "my-source"}, "sequences": 4, "length": 16},
    "plan": {"keep": 0.5, "score": {"use": "my-score"}, "assign": DERN["assign"]},
    "apply": {"merge": {"use": "my-merge"}, "router": {"use": "my-router"}},
}


@pytest.mark.parametrize(
    ("section", "part", "deed", "sentence"),
    [
        ("plan", "score", "nan", "scorer 'my-score', layer 0: score must be finite"),
        ("apply", "merge", "raise", "merge 'my-merge', layer 0: merge must raise nothing but"),
        ("apply", "router", "shape", "router 'my-router', layer 1: rows must be a float32 tensor of shape"),
    ],
)
def test_a_model_in_memory_is_as_it_was_also_after_an_error_in_its_last_layer(
    bench: Workbench, section: str, part: str, deed: str, sentence: str
) -> None:
    model = AutoModelForCausalLM.from_pretrained(bench.model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.config.to_dict()
    recipe = copy.deepcopy(RECIPE)
    recipe[section][part]["deed"] = deed
    with pytest.raises(ContractError) as caught:
        dernkit.compress(model, recipe, [torch.arange(32).view(2, 16)], registry=Registry.load())
    assert str(caught.value).startswith(MINE + sentence)
    assert model.config.to_dict() == config
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


ADAPTER = """\
from dataclasses import dataclass
from typing import ClassVar
from dernkit.api import hookimpl

@dataclass(frozen=True)
class Adapter:
    name: ClassVar[str] = "my-family"
    def blocks(self, model):
        return model.no_such_attribute

@hookimpl
def dernkit_adapters(): return [Adapter]
"""


@pytest.mark.parametrize("command", ["run", "inspect"])
def test_an_adapter_that_raises_is_named(installed: Install, bench: Workbench, command: str) -> None:
    installed("an-adapter", ADAPTER)
    result = run(bench) if command == "run" else CliRunner().invoke(main, ["inspect", str(bench.model)])
    assert said(result, 4) == (
        "plugin 'an-adapter-plugin' (an-adapter 3.1), adapter 'my-family': blocks must raise nothing but a "
        "DernkitError (law no_exception). Got AttributeError: 'MixtralForCausalLM' object has no attribute "
        "'no_such_attribute' instead. Fix the plugin, or uninstall it."
    )
    assert not bench.out.exists()
