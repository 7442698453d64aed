"""Experts that are modules of their own obey the laws that stacked ones do."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from dernkit.models.loading import load_checked
from dernkit.models.source import SourceModel, find_blocks, open_source
from dernkit.progress import Silent
from dernkit.recipe import Recipe
from dernkit.registry import Registry
from dernkit.stages import apply
from dernkit.stages.apply import apply_checkpoint, apply_live
from dernkit.stages.calibrate import batched, calibrate_checkpoint, calibrate_live
from dernkit.stages.plan import plan_checkpoint
from dernkit.types import LayerPlan
from tests.laws.module_models import MODELS, OwnAdapter, build
from tests.laws.pipeline import DERN, TOKENS, recipe, tensors
from tests.laws.test_uneven_laws import Falling
from tests.unit.workbench import dernkit, succeeded

IDS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
SHARDS = "40KB"


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A model, also on disk in several shards."""
    model = build(request.param)
    model.save_pretrained(tmp_path / "model", max_shard_size=SHARDS)
    return model, tmp_path / "model"


def opened(folder: Path, adapter: Any = None) -> SourceModel:
    return open_source(folder, [adapter or OwnAdapter()])


def planned(source: SourceModel, bound: Recipe) -> list[LayerPlan]:
    statistics = calibrate_checkpoint(
        source, batched(IDS, 2), bound.requires, sample_size=TOKENS, seed=bound.seed, progress=Silent()
    )
    return plan_checkpoint(source, bound.plan, statistics, Silent())


def compressed(folder: Path, out: Path, bound: Recipe, adapter: Any = None) -> list[LayerPlan]:
    source = opened(folder, adapter)
    plans = planned(source, bound)
    out.mkdir()
    applied(source, plans, bound, out)
    return plans


def applied(source: SourceModel, plans: list[LayerPlan], bound: Recipe, out: Path) -> None:
    merge, router = bound.apply.merge, bound.apply.router
    arguments = {"seed": bound.seed, "folder": out, "key": "test", "progress": Silent()}
    apply_checkpoint(source, plans, merge, router, **arguments)


def loaded(folder: Path) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    return model.eval()


@contextmanager
def masked(model: Any, plans: Sequence[LayerPlan]) -> Iterator[None]:
    """The model whose routers do not see the dropped experts."""
    hooks = []
    for plan in plans:

        def hide(_: Any, args: Any, logits: Tensor, dropped: list[int] = plan.dropped) -> Tensor:
            return logits.index_fill(-1, torch.tensor(dropped), -torch.inf)

        hooks.append(model.stack[plan.layer].ffn.selector.register_forward_hook(hide))
    yield
    for hook in hooks:
        hook.remove()


def test_what_keeps_everything_writes_the_sources_bytes(saved: Any, tmp_path: Path, registry: Registry):
    compressed(saved[1], tmp_path / "out", recipe(registry, keep=1.0))
    for file in sorted(saved[1].iterdir()):
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_pruning_is_masking_the_router(saved: Any, tmp_path: Path, registry: Registry):
    plans = compressed(saved[1], tmp_path / "out", recipe(registry))
    pruned = loaded(tmp_path / "out")
    assert pruned.config.specialists == 4 and len(pruned.stack[0].ffn.specialists) == 4
    with torch.no_grad(), masked(saved[0], plans):
        torch.testing.assert_close(pruned(IDS).logits, saved[0](IDS).logits, rtol=1e-4, atol=1e-5)
    kept = {name for name in tensors(saved[1]) if ".specialists." not in name}
    assert {name for name in tensors(tmp_path / "out") if ".specialists." not in name} == kept


def test_a_factor_of_the_block_is_found():
    scales = {kind: find_blocks(build(kind), [OwnAdapter()])[0].rehearsal().scale for kind in MODELS}  # type: ignore[attr-defined]
    assert scales == {"own_loop": 1, "own_dict": pytest.approx(2.5), "own_plain": 1, "own_called": 1}


def test_statistics_are_those_of_the_live_model(saved: Any, registry: Registry):
    names = recipe(registry).requires | {"routed", "output_sum", "reap_sum"}
    options: Any = {"sample_size": 0, "seed": 0, "progress": Silent()}
    stored = calibrate_checkpoint(opened(saved[1]), batched(IDS, 2), names, **options)
    live = calibrate_live(saved[0], find_blocks(saved[0], [OwnAdapter()]), batched(IDS, 2), names, **options)
    for layer, values in stored.items():
        moe = saved[0].stack[layer].ffn
        assert int(values["routed"].sum()) == IDS.numel() * moe.consulted
        for name in names:  # in a mapped file tensors lie anywhere, and kernels round differently
            torch.testing.assert_close(values[name], live[layer][name], rtol=1e-5, atol=1e-6)


MERGES = {"own_dict": "concatenate", "own_called": "concatenate"}  # the shared expert is widened, too


def test_live_surgery_has_the_bits_of_the_checkpoint(saved: Any, tmp_path: Path, registry: Registry):
    model = saved[0]
    merge = MERGES.get(model.config.model_type, "spherical-kmeans")
    bound = recipe(registry, assign={**DERN, "threshold": 0.1}, merge=merge)
    plans = compressed(saved[1], tmp_path / "out", bound)
    assert all(len(plan.assignment.source) for plan in plans)
    blocks = find_blocks(model, [OwnAdapter()])
    apply_live(model, blocks, plans, bound.apply.merge, bound.apply.router, seed=bound.seed)
    on_disk, state = tensors(tmp_path / "out"), model.state_dict()
    assert on_disk.keys() == state.keys()
    assert all(torch.equal(on_disk[name], value) for name, value in state.items())
    model.save_pretrained(tmp_path / "live")
    with torch.no_grad():
        logits = [loaded(tmp_path / folder)(IDS).logits for folder in ("out", "live")]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(IDS).logits, logits[1], rtol=1e-5, atol=1e-5)
    assert opened(tmp_path / "out").outline[1][0].dims == find_blocks(model, [OwnAdapter()])[0].dims


class Killed(BaseException):
    """In the place of a kill."""


def test_a_killed_run_goes_on(tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch):
    build("own_loop").save_pretrained(tmp_path / "model", max_shard_size=SHARDS)
    bound = recipe(registry)
    plans = compressed(tmp_path / "model", tmp_path / "whole", bound)
    (tmp_path / "killed").mkdir()
    done: list[Any] = []

    def dying(work: Any, *rest: Any) -> Any:
        if done:
            raise Killed
        done.append(work)
        return original(work, *rest)

    original = apply._compressed
    monkeypatch.setattr(apply, "_compressed", dying)
    with pytest.raises(Killed):
        applied(opened(tmp_path / "model"), plans, bound, tmp_path / "killed")
    monkeypatch.setattr(apply, "_compressed", original)
    applied(opened(tmp_path / "model"), plans, bound, tmp_path / "killed")
    for file in (tmp_path / "whole").iterdir():
        assert (tmp_path / "killed" / file.name).read_bytes() == file.read_bytes()


def test_a_prediction_layer_behind_the_last_one_keeps_up(tmp_path: Path, registry: Registry):
    build("own_loop").save_pretrained(tmp_path / "model")
    stored = tensors(tmp_path / "model")
    extra = {f"stack.2.{name[8:]}": value + 1 for name, value in stored.items() if name.startswith("stack.1.")}
    file = tmp_path / "model/model.safetensors"
    save_file(stored | extra | {"stack.2.eh_proj.weight": torch.ones(32, 64)}, file, metadata={"format": "pt"})
    plans = compressed(tmp_path / "model", tmp_path / "out", recipe(registry))
    result = tensors(tmp_path / "out")
    for place, expert in enumerate(plans[-1].kept.tolist()):
        name = "ffn.specialists.{}.w_out.weight"
        assert torch.equal(result[f"stack.2.{name.format(place)}"], extra[f"stack.2.{name.format(expert)}"])
    assert sum(".w_out." in name and name.startswith("stack.2.ffn.s") for name in result) == 4
    compressed(tmp_path / "model", tmp_path / "all", recipe(registry, keep=1.0))
    assert (tmp_path / "all/model.safetensors").read_bytes() == file.read_bytes()


FILLED = {
    "own_loop": {"return chosen, coefficients": "return chosen, coefficients / coefficients.sum(dim=-1, keepdim=True)"},
    "own_dict": {"softmax(dim=-1)": "sigmoid()"},
    "own_called": {},
}
"""What a person would correct in lines that ask for it, or in the one behind such a line."""


@pytest.mark.parametrize("saved", FILLED, indirect=True)
def test_the_adapter_that_inspect_begins_compresses(
    saved: Any, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
):
    model, folder = saved
    said = succeeded(dernkit("inspect", str(folder), "--explain")).stdout
    text = said.partition("A starting adapter, to be completed:\n\n")[2]
    for line, better in FILLED[model.config.model_type].items():
        at = text.index(line)
        assert "CHECK" in text[text.rindex("\n", 0, text.rindex("\n", 0, at)) : text.index("\n", at)]
        text = text.replace(line, better)
    starter: Any = ModuleType("starter")
    monkeypatch.setitem(sys.modules, "starter", starter)
    exec(compile(text, "starter.py", "exec"), vars(starter))
    (adapter,) = starter.dernkit_adapters()
    plans = compressed(folder, tmp_path / "out", recipe(registry, assign=DERN), adapter())
    assert (
        compressed(folder, tmp_path / "own", recipe(registry, assign=DERN))[0].kept.tolist() == plans[0].kept.tolist()
    )
    for file in (tmp_path / "own").iterdir():
        assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


def test_experts_of_different_counts_are_loaded_by_dernkit_only(
    saved: tuple[Any, Path], tmp_path: Path, registry: Registry
) -> None:
    """A module that is not there would be missing tensors only: the router's rows stop stock transformers."""
    model, folder = saved
    bound = recipe(registry, export="dernkit")
    plans = compressed(folder, tmp_path / "out", replace(bound, plan=replace(bound.plan, budget=Falling())))
    assert len({len(plan.kept) for plan in plans}) > 1
    with pytest.raises(RuntimeError, match=r"size mismatch|mismatched"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with masked(model, plans):
        expected = model(IDS).logits
    found = load_checked(tmp_path / "out", [OwnAdapter()])(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
