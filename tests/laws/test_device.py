"""On another device everything is as on the CPU, but for the last bits: nothing is computed on the wrong one."""

from __future__ import annotations

import json
import re
import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dernkit
from dernkit.builtin.evaluators import Fidelity, Perplexity
from dernkit.builtin.generation import Generation
from dernkit.compare.engine import Comparison
from dernkit.compare.rows import read_rows
from dernkit.models.device import device_of
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.profiling.command import profile
from dernkit.progress import Silent
from dernkit.recipe import Recipe, load_recipe
from dernkit.registry import Registry
from dernkit.run import Run
from dernkit.stages.calibrate import batched, calibrate_checkpoint
from dernkit.stages.evaluate import evaluate
from dernkit.stages.plan import plan_checkpoint
from dernkit.testing.checkpoints import save_tiny, tiny_tokenizer
from dernkit.testing.quantised import quantise_fp8, quantise_mxfp4
from dernkit.testing.runs import TEXT
from dernkit.types import STATISTICS
from tests.laws.every_model import load, saved
from tests.laws.mtp_checkpoints import save
from tests.laws.pipeline import DERN, carry_out, recipe, source, tensors
from tests.laws.test_every_family import TOKENS, every_family
from tests.second_device import SECOND, in_use
from tests.unit.comparing import Comparing
from tests.unit.workbench import Workbench, edit_tensors, save_tokenizer, succeeded
from tests.unit.workbench import dernkit as cli

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
QUICK = ("dern-hungarian", "dern-kmeans-activation", "m-smoe", "prune-reconstruction-budget", "ream", "shrink-width")
"""With what the families run through, they have most of the built-in components."""
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Mixtral with its tokenizer, and a text beside it."""
    folder = tmp_path_factory.mktemp("device") / "model"
    save_tiny(folder, "mixtral", num_hidden_layers=2)
    tiny_tokenizer().save_pretrained(folder)
    (folder.parent / "calib.txt").write_text(TEXT, encoding="utf-8")
    return folder


def shipped(path: Path, model: Path, registry: Registry) -> Recipe:
    """A recipe on a few tokens of the text beside the model."""
    text = re.sub(r"sequences: \d+", "sequences: 4", path.read_text(encoding="utf-8"))
    file = model.parent / path.name
    file.write_text(re.sub(r"length: \d+", "length: 16", text).replace("calibration.txt", "calib.txt"))
    return load_recipe(file, registry)


def assert_near(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name].double(), tensor.double(), rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=() if path.stem in QUICK else pytest.mark.families) for path in RECIPES],
    ids=lambda path: path.stem,
)
def test_every_recipe(path: Path, model: Path, tmp_path: Path, registry: Registry) -> None:
    bound = shipped(path, model, registry)
    Run(bound, "tiny", model, tmp_path / "cpu", registry, Silent(), device=CPU).execute()
    with in_use():
        Run(bound, "tiny", model, tmp_path / "other", registry, Silent(), device=SECOND).execute()
    assert_near(tensors(tmp_path / "other" / "model"), tensors(tmp_path / "cpu" / "model"))


@every_family
def test_every_family(tmp_path: Path, registry: Registry, family: str) -> None:
    folder = tmp_path / "model"
    saved(folder, family)
    bound = recipe(registry, assign={**DERN, "quantile": 0.5}, router="additive", score="reap")
    found: list[Any] = []
    for device, watched in ((CPU, nullcontext), (SECOND, in_use)):
        opened = replace(source(folder), device=device)
        how: Any = {"sample_size": 64, "seed": 0, "progress": Silent()}
        with watched():
            stats = calibrate_checkpoint(opened, batched(TOKENS, 2), frozenset(STATISTICS), **how)
        with watched():
            plans = plan_checkpoint(opened, bound.plan, stats, Silent())
        with watched():
            carry_out(opened, plans, bound, tmp_path / device.type)
        found.append((stats, [plan.kept.tolist() for plan in plans], tensors(tmp_path / device.type)))
    (expected, kept, weights), (stats, also_kept, also_weights) = found
    assert also_kept == kept
    for layer, values in expected.items():
        assert_near(dict(stats[layer].values), dict(values.values))
    assert_near(also_weights, weights)


def double_first_layer(weights: dict[str, torch.Tensor]) -> None:
    """Its experts stay where one threshold is for all layers."""
    for name in weights:
        if "layers.0.block_sparse_moe.experts" in name:
            weights[name] *= 2


@pytest.mark.parametrize("kind", ["fp8", "mxfp4", "uneven", "mtp"])
def test_every_kind_of_checkpoint(kind: str, tmp_path: Path) -> None:
    family = {"fp8": "deepseek_v3", "mxfp4": "gpt_oss"}.get(kind, "mixtral")
    bench = Workbench(tmp_path, family, dtype=torch.bfloat16)
    if kind == "fp8":
        quantise_fp8(bench.model, 16, 10)
    if kind == "mxfp4":
        quantise_mxfp4(bench.model)
    if kind == "mtp":
        shutil.rmtree(bench.model)
        save(bench.model, "qwen")
        save_tokenizer(bench.model)
    more: list[str] = []
    if kind == "uneven":
        edit_tensors(bench.model / "model.safetensors", double_first_layer)
        for option in ("plan.score={use: weight-norm}", "plan.budget={use: global, normalise: none}"):
            more += ["--set", option]
        more += ["--set", "apply.export=dernkit"]
    for name in ("cpu", SECOND.type):
        where = ["--model", str(bench.model), "--out", str(tmp_path / name), "--device", name]
        succeeded(cli("run", str(bench.recipe), *where, *more))
    assert_near(tensors(tmp_path / SECOND.type / "model"), tensors(tmp_path / "cpu" / "model"))
    config = json.loads((tmp_path / "cpu" / "model" / "config.json").read_text())
    assert ("dernkit_experts" in config) == (kind == "uneven")
    measured = [Perplexity(bench.text, length=32)]
    how: Any = {"what": "model", "adapters": [Universal()], "device": SECOND}
    assert 0 < evaluate(tmp_path / "cpu" / "model", measured, Silent(), **how)["0:perplexity"]["mean/loss"] < 10


def test_a_model_in_memory_is_compressed_where_it_lies(model: Path, registry: Registry) -> None:
    bound = shipped(RECIPES[0].with_name("recombine-fast.yaml"), model, registry)
    tokens = torch.randint(3, 90, (4, 16), generator=torch.Generator().manual_seed(0))
    found = []
    for device in (CPU, SECOND):
        live = load("mixtral", model).to(device)
        dernkit.compress(live, bound, [tokens], registry=registry)
        assert {tensor.device.type for tensor in live.parameters()} == {device.type}
        assert all(block.dims.experts == 4 for block in find_blocks(live, [Universal()]))
        found.append({name: tensor.cpu() for name, tensor in live.state_dict().items()})
    assert_near(found[1], found[0])


def test_measurements(tmp_path: Path) -> None:
    saved(tmp_path, "mixtral")  # in float32: in bfloat16 other kernels would round otherwise
    tiny_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    text: Any = {"path": tmp_path / "text.txt"}
    evaluators = [
        Perplexity(**text, length=32),
        Fidelity(**text, length=32),
        Generation(**text, prompts=4, prompt_length=8, new_tokens=8),
    ]
    found = [
        evaluate(tmp_path, evaluators, Silent(), what="model", original=tmp_path, device=device)
        for device in (CPU, SECOND)
    ]
    for name, expected in found[0].items():
        assert found[1][name] == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_a_profile(model: Path, registry: Registry) -> None:
    bound = shipped(RECIPES[0].with_name("dern.yaml"), model, registry)
    how: Any = {"keeps": (0.5,), "device": CPU}
    expected = profile(bound, "tiny", model, registry, Silent(), **how)
    found = profile(bound, "tiny", model, registry, Silent(), **{**how, "device": SECOND})
    assert found["ratios"][0]["error"]["mean"] == pytest.approx(expected["ratios"][0]["error"]["mean"], rel=1e-3)


def test_a_comparison(tmp_path: Path, registry: Registry) -> None:
    made = Comparing(tmp_path)
    recipes = {"prune": "prune.yaml", "dern": "dern.yaml", "sequential": "sequential.yaml"}
    models = {"mixtral": {"path": "mixtral"}}
    made.write(models=models, recipes=recipes, seeds=[0], stability={"scorers": ["gate-mass"], "shares": [0.5, 1.0]})
    found = []
    for device in (CPU, SECOND):
        work = Comparison(made.bench(registry), tmp_path / device.type, registry, Silent(), device=device)
        found.append(read_rows(work.execute()))
    for row, expected in zip(found[1], found[0], strict=True):
        assert not row.refused
        assert row.metrics == pytest.approx(expected.metrics, rel=1e-3, abs=1e-4)


def test_auto_is_a_gpu_or_the_cpu() -> None:
    assert device_of("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_second_device_refuses_what_a_gpu_refuses() -> None:
    there, here = torch.ones(2, 2).to(SECOND), torch.ones(2, 2)
    for wrong in (
        lambda: there + here,
        lambda: torch.cat([here, there]),
        lambda: here[there[0].long()],
        lambda: here.index_select(0, there[0].long()),
        lambda: torch.randperm(4, generator=torch.Generator(), device=SECOND),
        lambda: there.long() @ there.long(),
        lambda: there.numpy(),
    ):
        with pytest.raises((RuntimeError, NotImplementedError, TypeError)):
            wrong()
    assert (there * 2 + 1)[torch.tensor([0])].tolist() == [[3.0, 3.0]]


def test_a_device_that_is_not_there_is_refused(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    for name in ("abacus", "cuda:99", "meta"):
        result = cli("run", str(bench.recipe), "--model", str(bench.model), "--out", str(bench.out), "--device", name)
        assert (result.exit_code, result.stdout, bench.out.exists()) == (2, "", False)
        assert result.stderr.startswith("--device: must be a device that torch can put float64 tensors on here. Got '")
        assert len(result.stderr.splitlines()) == 1


def test_too_little_memory_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path)

    def full(*arguments: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("dernkit.builtin.scorers.GateMass.score", full)
    result = bench.run()
    assert (result.exit_code, result.stdout) == (5, "")
    assert result.stderr.splitlines()[-1].startswith("--device: the memory there must hold a decoder layer")
    monkeypatch.undo()
    bench.finish()
