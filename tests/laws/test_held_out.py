"""Text that nothing is fitted to: no component sees it, and the report tells each layer's error on it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import pytest
import torch
from transformers import AutoModelForCausalLM

from dernkit import compress
from dernkit.kernel import calls
from dernkit.recipe import load_recipe
from dernkit.registry import Registry
from dernkit.run import calibration_batches
from dernkit.testing.banks import random_bank
from dernkit.testing.cases import statistics
from dernkit.types import ExpertBank, LayerPlan, LayerStats
from tests.laws.moments import Moments, put_back
from tests.laws.pipeline import source
from tests.unit.toy_components import plugin_of
from tests.unit.workbench import Workbench, results, succeeded

RECOMBINE = {"assign": {"use": "function-space", "parts": 2}, "merge": {"use": "adopt"}}
REFIT = ("apply.refit={use: least-squares, parts: 2}", "calibrate.holdout=0.25")


@pytest.fixture
def bench(tmp_path: Path) -> Workbench:
    bench = Workbench(tmp_path, shard="150KB")
    bench.write(**RECOMBINE)
    return bench


def fits(out: Path) -> dict[str, dict[str, float]]:
    """What is remembered of each refitted layer."""
    found: dict[str, dict[str, float]] = json.loads((out / "model" / "dernkit.json").read_text())["fits"]
    return found


def test_no_component_sees_what_is_held_out() -> None:
    seen: list[LayerStats] = []

    class Looks:
        name, requires = "looks", frozenset({"sample", "gate_sum"})

        def score(self, bank: ExpertBank, stats: LayerStats) -> torch.Tensor:
            seen.append(stats)
            return stats["gate_sum"]

    bank = random_bank(4, 5, 3)
    whole = statistics(bank)
    stats = LayerStats(whole.tokens, whole.values, whole.sample_size, held_out=whole.tokens // 4)
    calls.score(Looks(), bank, stats)
    kept, last = seen[0]["sample_token"], whole.tokens - whole.tokens // 4
    assert 0 < len(kept) < len(whole["sample"]) and int(kept.max()) < last and seen[0].sampled_tokens == last
    assert len(seen[0]["sample"]) == len(seen[0].router_inputs) == len(kept)
    assert torch.equal(seen[0]["gate_sum"], whole["gate_sum"])
    judges = stats.judges()
    assert int(judges["sample_token"].min()) >= last and len(judges["sample"]) + len(kept) == len(whole["sample"])


def test_the_report_tells_the_error_on_both(bench: Workbench) -> None:
    bench.finish(*REFIT)
    found = fits(bench.out)
    assert list(found) == ["0", "1"]
    for fit in found.values():
        assert 0 < fit["inside"] < 1 and fit["outside"] > 0 and fit["width"] == 24 and 0 < fit["fewest"] <= 48
    report = (bench.out / "report.md").read_text()
    assert "## Refit" in report and f"| 0 | {found['0']['inside']:.1%} | {found['0']['outside']:.1%} |" in report
    assert ("fewer sampled tokens than neurons" in report) == any(fit["fewest"] < 24 for fit in found.values())


def test_nothing_held_out_leaves_nothing_to_judge_by(bench: Workbench) -> None:
    bench.finish(REFIT[0])
    assert all(fit["outside"] is None for fit in fits(bench.out).values())
    assert "| 0 | " in (bench.out / "report.md").read_text()


def test_without_a_refit_there_is_nothing_to_tell(bench: Workbench) -> None:
    bench.finish()
    assert fits(bench.out) == {} and "## Refit" not in (bench.out / "report.md").read_text()


def test_a_refit_that_reads_no_samples_is_not_judged_by_them(bench: Workbench) -> None:
    @dataclass(frozen=True)
    class Halves:
        name: ClassVar[str] = "halves"
        requires: ClassVar[frozenset[str]] = frozenset()

        def refit(self, bank: ExpertBank, after: ExpertBank, plan: LayerPlan, stats: LayerStats) -> torch.Tensor:
            return after.down.float() / 2

    registry = Registry.load(entry_points=False)
    registry.register(plugin_of("dernkit_refits", Halves), "mine")
    bench.write()
    with patch("tests.unit.workbench._builtins", lambda: registry):
        output = bench.finish("apply.refit={use: halves}")
    assert set(json.loads((output / "dernkit.json").read_text()).get("fits", {}).values()) <= {None}
    assert "## Refit" not in (bench.out / "report.md").read_text()


def test_a_kill_changes_no_byte(bench: Workbench, tmp_path: Path) -> None:
    moments = Moments(bench.out)
    with moments.watched():
        bench.finish(*REFIT)
    expected = {name: value for name, value in results(bench.out).items() if name != "report.md"}
    between = [
        state for state in moments.states if '"done": [0]' in state.get(".partial/model/.journal.json", b"").decode()
    ]
    assert between
    for number, state in enumerate(between[:: max(1, len(between) // 3)]):
        bench.out = put_back(state, tmp_path / str(number) / "out")
        succeeded(bench.run(*REFIT))
        assert {name: value for name, value in results(bench.out).items() if name != "report.md"} == expected


@pytest.mark.parametrize("sequential", ["false", "true"])
def test_from_disk_is_in_memory(bench: Workbench, registry: Registry, sequential: str) -> None:
    options = [*REFIT, f"calibrate.sequential={sequential}"]
    written = AutoModelForCausalLM.from_pretrained(bench.finish(*options), dtype="auto").state_dict()
    bound = load_recipe(bench.recipe, registry, options)
    assert bound.calibrate is not None
    batches = calibration_batches(source(bench.model), bound.calibrate, bound.seed)
    model = AutoModelForCausalLM.from_pretrained(bench.model, dtype="auto")
    compress(model, bound, batches, registry=registry)
    for name, value in model.state_dict().items():
        assert torch.equal(value, written[name]), name


def test_experts_get_narrower_and_none_goes(bench: Workbench) -> None:
    output = bench.finish("plan.keep=1.0", "plan.assign.width=0.5", *REFIT)
    config = json.loads((output / "config.json").read_text())
    assert (config["num_local_experts"], config["intermediate_size"]) == (8, 16)
    logits = AutoModelForCausalLM.from_pretrained(output)(torch.arange(3, 20)[None]).logits
    assert bool(logits.isfinite().all())
    plan = json.loads((bench.out / "plan.json").read_text())
    assert plan["layers"]["0"]["kept"] == list(range(8))
