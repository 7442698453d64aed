"""Experts that are modules of their own obey the laws that stacked ones do."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from dernkit.api import CheckpointError
from dernkit.architecture import ModuleExperts, blocks_by_layout
from dernkit.models.layout import Layout
from dernkit.models.source import SourceModel, find_blocks, open_source
from dernkit.progress import Silent
from dernkit.recipe import Recipe
from dernkit.registry import Registry
from dernkit.stages import apply
from dernkit.stages.apply import apply_checkpoint, apply_live
from dernkit.stages.calibrate import batched, calibrate_checkpoint, calibrate_live
from dernkit.stages.plan import plan_checkpoint
from dernkit.types import LayerPlan
from tests.laws.module_models import MODELS, Gated, LoopLayout, LoopMoE, OwnAdapter, build
from tests.laws.pipeline import DERN, TOKENS, recipe, tensors

IDS = torch.randint(3, 96, (4, 16), generator=torch.Generator().manual_seed(0))
SHARDS = "40KB"


@pytest.fixture(params=MODELS)
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A model, also on disk in several shards."""
    model = build(request.param)
    model.save_pretrained(tmp_path / "model", max_shard_size=SHARDS)
    return model, tmp_path / "model"


def opened(folder: Path) -> SourceModel:
    return open_source(folder, [OwnAdapter()])


def planned(source: SourceModel, bound: Recipe) -> list[LayerPlan]:
    statistics = calibrate_checkpoint(
        source, batched(IDS, 2), bound.requires, sample_size=TOKENS, seed=bound.seed, progress=Silent()
    )
    return plan_checkpoint(source, bound.plan, statistics, Silent())


def compressed(folder: Path, out: Path, bound: Recipe) -> list[LayerPlan]:
    source = opened(folder)
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


@pytest.mark.parametrize("merge", ["spherical-kmeans", "concatenate"])
def test_live_surgery_has_the_bits_of_the_checkpoint(saved: Any, merge: str, tmp_path: Path, registry: Registry):
    bound = recipe(registry, assign={**DERN, "threshold": 0.1}, merge=merge)
    model = saved[0]
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


class WrongRoute(LoopLayout):
    """Does not divide by the sum, as the block does."""

    def route(self, block: Any, output: Any) -> tuple[Tensor, Tensor]:
        coefficients, chosen = output.softmax(dim=-1).topk(block.consulted)
        return chosen, coefficients


class WrongOrder(LoopLayout):
    """Takes the router's answer for coefficients first, as many routers give it."""

    def route(self, block: Any, output: Any) -> tuple[Tensor, Tensor]:
        chosen, coefficients = super().route(block, output)
        return chosen.flip(-1), coefficients


class NoRoute(LoopLayout):
    route = Layout.route


class NoRouter(LoopLayout):
    router = None


class NoTopK(LoopLayout):
    top_k = Layout.top_k


class Swapped(LoopLayout):
    gate, up, down = "w_val", "w_act", "w_out"


class WrongActivation(LoopLayout):
    def activation(self, module: Any, gate: Tensor | None, up: Tensor) -> Tensor:
        assert gate is not None
        return gate.relu() * up


REFUSALS = {
    WrongRoute: "must add coefficient times expert output for the routing that its layout tells. Got another sum",
    WrongOrder: "must add coefficient times expert output for the routing that its layout tells. Got another sum",
    NoRoute: "must run on hidden states alone to be understood. Got 'NoRoute has a router and no route()'",
    NoRouter: "a layout that claims a whole MoE block must name its router. Got none for 'stack.0.ffn'",
    NoTopK: "the router must say how many experts a token takes. Got no top-k field instead",
    Swapped: "experts must compute down(act(gate(x)) * up(x)) of the weights found. Got outputs",
    WrongActivation: "experts must compute down(act(gate(x)) * up(x)) of the weights found. Got outputs",
}


@pytest.mark.parametrize("layout", REFUSALS)
def test_a_wrong_layout_is_refused(layout: type[ModuleExperts]):
    _refused(build("own_loop"), layout(), REFUSALS[layout])


class Normed(Gated):
    """Has a norm of its own, which no linear layer holds."""

    def __init__(self, breadth: int, width: int) -> None:
        super().__init__(breadth, width)
        self.inner = nn.RMSNorm(width)


class Companion(LoopMoE):
    """Has a second module for each expert, outside the list."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.more = nn.ModuleList(nn.Linear(4, 4) for _ in range(config.specialists))


class NormedMoE(LoopMoE):
    expert = Normed


class RouterNorm(LoopMoE):
    """What the router sees is not what the experts see."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.selector = nn.Sequential(nn.Linear(config.breadth, config.specialists, bias=False))

    def forward(self, hidden: Tensor) -> Tensor:
        flat = hidden.reshape(-1, hidden.shape[-1])
        chosen, coefficients = self.routing(self.selector(2 * flat + 1))
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.called()):
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, coefficients[token, place, None] * expert(flat[token]))
        return out.view_as(hidden)


MODEL_REFUSALS = {
    NormedMoE: "experts must hold the tensors that their layout packs. Got 'stack.0.ffn.specialists.0.inner.weight'",
    Companion: "the same tensors and modules must exist at every expert count and width. Got 'stack.0.ffn.more.",
    RouterNorm: "must add coefficient times expert output for the routing that its layout tells. Got another sum",
}


@pytest.mark.parametrize("moe", MODEL_REFUSALS)
def test_what_the_layout_does_not_cover_is_refused(moe: type[nn.Module]):
    layout = LoopLayout()
    layout.class_name = moe.__name__
    _refused(build(f"own_{moe.__name__.lower()}", moe), layout, MODEL_REFUSALS[moe])


def _refused(model: Any, layout: ModuleExperts, sentence: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        for block in blocks_by_layout(model, [layout]):
            block.router_kind()
            block.check()
    assert sentence in str(caught.value)
