"""Sequential calibration: every layer's statistics on what the compressed layers before it put out."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import dernkit
from dernkit.api import Block
from dernkit.errors import ContractError
from dernkit.kernel.compress import compress_layer
from dernkit.kernel.planning import plan_layer
from dernkit.kernel.selection import kept_count, limits
from dernkit.kernel.statistics import Accumulator
from dernkit.models.probe import set_field
from dernkit.models.stack import find_blocks
from dernkit.models.store import Store
from dernkit.models.universal import Universal
from dernkit.progress import Silent
from dernkit.recipe import Recipe
from dernkit.registry import Registry
from dernkit.stages import sequential
from dernkit.stages.apply import apply_checkpoint
from dernkit.stages.calibrate import calibrate_checkpoint
from dernkit.stages.plan import plan_checkpoint
from dernkit.types import STATISTICS, LayerPlan, LayerStats
from tests import families
from tests.laws.every_model import aligned, load, logits, saved
from tests.laws.pipeline import DERN, recipe, source, tensors
from tests.laws.test_every_family import REFUSED
from tests.unit.workbench import edit_config

KINDS = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss", "jamba", "diffusion_gemma_text", "zaya", "glm_moe_dsa")
"""Without and with dense layers, groups, biases; the last three pass a cache or state from layer to layer."""
every_family = pytest.mark.parametrize(
    "family",
    [
        pytest.param(name, marks=() if name in KINDS else pytest.mark.families)
        for name in families.FAMILIES
        if name not in REFUSED
    ],
)
every_kind = pytest.mark.parametrize("family", KINDS)
TOKENS = torch.randint(3, families.VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(2))
BATCHES = TOKENS.split(2)
EVERYTHING = frozenset(STATISTICS)
OPTIONS: dict[str, Any] = {"sample_size": 8, "seed": 0, "progress": Silent()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "source"


def dern(registry: Registry, keep: float = 0.5, **options: Any) -> Recipe:
    """Recombines segments and changes routers, sequentially."""
    bound = recipe(registry, keep=keep, score="reap", assign={**DERN, "quantile": 0.5}, router="additive", **options)
    assert bound.calibrate is not None
    return replace(bound, calibrate=replace(bound.calibrate, sequential=True, sample=8))


def streamed(folder: Path, bound: Recipe) -> tuple[dict[int, LayerStats], list[LayerPlan]]:
    return sequential.calibrate_checkpoint(source(folder), BATCHES, EVERYTHING, bound.plan, bound.apply, **OPTIONS)


def same(mine: LayerStats, other: LayerStats) -> bool:
    return mine.tokens == other.tokens and all(
        torch.equal(value, other[name])
        for name, value in mine.values.items()
        if mine.values.keys() == other.values.keys()
    )


def assert_same_plans(mine: list[LayerPlan], others: list[LayerPlan]) -> None:
    assert len(mine) == len(others)
    for plan, other in zip(mine, others, strict=True):
        assert (plan.layer, plan.experts, plan.width, plan.one_group) == (
            other.layer,
            other.experts,
            other.width,
            other.one_group,
        )
        for name in ("scores", "kept"):
            assert torch.equal(getattr(plan, name), getattr(other, name)), (plan.layer, name)
        for name in ("source", "target", "partner", "affinity"):
            assert torch.equal(getattr(plan.assignment, name), getattr(other.assignment, name)), (plan.layer, name)


@every_family
def test_keeping_all_is_calibrating_at_once(folder: Path, registry: Registry, family: str):
    saved(folder, family)
    at_once = calibrate_checkpoint(source(folder), BATCHES, EVERYTHING, **OPTIONS)
    stats, _ = streamed(folder, dern(registry, keep=1.0))
    assert stats.keys() == at_once.keys()
    assert all(same(stats[layer], at_once[layer]) for layer in stats)


@every_family
def test_only_the_first_layer_sees_what_it_sees_at_once(folder: Path, registry: Registry, family: str):
    saved(folder, family)
    at_once = calibrate_checkpoint(source(folder), BATCHES, EVERYTHING, **OPTIONS)
    stats, plans = streamed(folder, dern(registry))
    first, *later = sorted(stats)
    assert all(plan.dropped for plan in plans)
    assert same(stats[first], at_once[first])
    assert later or family not in KINDS
    assert not any(torch.equal(stats[layer]["sample"], at_once[layer]["sample"]) for layer in later)


@every_family
def test_from_disk_is_in_memory(folder: Path, tmp_path: Path, registry: Registry, family: str):
    """Statistics and plans, then the models."""
    saved(folder, family)
    bound, out = dern(registry), tmp_path / "out"
    stats, plans = streamed(folder, bound)
    live = load(family, folder)
    before = {name: tensor.clone() for name, tensor in live.state_dict().items()}
    blocks = find_blocks(live, [Universal()])
    found, planned = sequential.calibrate_live(live, blocks, BATCHES, EVERYTHING, bound.plan, bound.apply, **OPTIONS)
    assert found.keys() == stats.keys()
    assert all(same(found[layer], stats[layer]) for layer in stats)
    assert_same_plans(planned, plans)
    after = live.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert_same_plans(dernkit.compress(live, bound, BATCHES, registry=registry), plans)
    carry_out(folder, out, bound, plans, stats)
    reloaded = load(family, out)
    for (name, mine), theirs in zip(live.state_dict().items(), reloaded.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert torch.equal(logits(aligned(live.eval()), family), logits(aligned(reloaded), family))


def carry_out(folder: Path, out: Path, bound: Recipe, plans: list[LayerPlan], stats: Mapping[int, LayerStats]) -> None:
    out.mkdir()
    how, options = bound.apply, {"seed": bound.seed, "folder": out, "key": "test", "progress": Silent()}
    apply_checkpoint(source(folder), plans, how.merge, how.router, width=how.width, stats=stats, **options)


@every_kind
def test_the_plan_stage_makes_the_same_plans_from_the_statistics(folder: Path, registry: Registry, family: str):
    saved(folder, family)
    bound = dern(registry)
    stats, plans = streamed(folder, bound)
    assert_same_plans(plan_checkpoint(source(folder), bound.plan, stats, Silent()), plans)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_apply_writes_is_what_the_batches_ran_through(
    folder: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, family: str, dtype: torch.dtype
):
    saved(folder, family, dtype=dtype)
    assert_written_is_run(folder, tmp_path / "out", dern(registry), monkeypatch)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_what_is_written_in_one_dtype_and_run_in_another_is_the_same(
    folder: Path, tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, family: str
):
    """float32 on disk is compressed as float32, and runs in the bfloat16 that config.json asks for."""
    saved(folder, family)
    edit_config(folder, dtype="bfloat16")
    ran = assert_written_is_run(folder, tmp_path / "out", dern(registry), monkeypatch)
    assert {tensor.dtype for tensor in ran.values()} == {torch.bfloat16}
    assert {tensor.dtype for tensor in tensors(tmp_path / "out").values()} == {torch.float32}


def assert_written_is_run(folder: Path, out: Path, bound: Recipe, monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Bit for bit, every tensor of every MoE block but the last, through which nothing needs to run."""
    ran: dict[str, Tensor] = {}
    compressed = sequential.compressed

    @contextmanager
    def seen(model: Any, block: Block, layer: Any) -> Iterator[None]:
        with compressed(model, block, layer):
            yield
            inside = model.get_submodule(block.path).state_dict()
            ran.update({f"{block.path}.{name}": tensor.clone() for name, tensor in inside.items()})

    monkeypatch.setattr(sequential, "compressed", seen)
    stats, plans = streamed(folder, bound)
    carry_out(folder, out, bound, plans, stats)
    store, blocks = source(out).open()
    written: dict[str, Tensor] = {}
    for block in blocks[:-1]:
        inside = store.load(block.path).state_dict()
        written |= {f"{block.path}.{name}": tensor for name, tensor in inside.items()}
    assert written.keys() == ran.keys()
    for name, tensor in ran.items():
        assert tensor.dtype == written[name].dtype and torch.equal(tensor, written[name]), name
    return ran


@every_kind
def test_the_slow_way_gives_the_same_plans(folder: Path, registry: Registry, family: str):
    """For every layer the model anew: compressed in memory up to the layer before it, and run as a whole."""
    saved(folder, family)
    bound = dern(registry)
    stats, plans = streamed(folder, bound)
    slow: list[LayerPlan] = []
    for index in range(len(plans)):
        found, plan = by_hand(load(family, folder), slow, index, bound)
        slow.append(plan)
        assert found.keys() == stats[plan.layer].values.keys() - {"router_sample"}
        for name, value in found.items():
            torch.testing.assert_close(stats[plan.layer][name], value, rtol=1e-5, atol=1e-5)
        assert torch.equal(plan.kept, plans[index].kept)
        for name in ("source", "target", "partner"):
            assert torch.equal(getattr(plan.assignment, name), getattr(plans[index].assignment, name))


def by_hand(model: Any, plans: list[LayerPlan], index: int, bound: Recipe) -> tuple[Mapping[str, Tensor], LayerPlan]:
    """Statistics and plan of the MoE block ``index`` when those before it are compressed."""
    model.set_experts_implementation("eager")
    blocks = find_blocks(model, [Universal()])
    how = bound.apply
    for block, plan in zip(blocks[:index], plans, strict=True):
        with torch.no_grad():
            block.replace(compress_layer(block.bank(), plan, how.merge, how.router, plan.width, bound.seed))
        own = copy.deepcopy(model.config)  # one of its own: some routers read the count there
        for field, value in block.config_changes(len(plan.kept), plan.width).items():
            set_field(own, field, value)
        for module in model.get_submodule(block.path).modules():
            if "config" in vars(module):
                module.config = own.get_text_config()
    block = blocks[index]
    bank = block.bank()
    accumulator = Accumulator(block.dims, EVERYTHING, sample_size=8, seed=0)
    handle = block.on_routing(lambda *seen: accumulator.update(bank, *seen))
    with torch.no_grad():
        for batch in BATCHES:
            model(input_ids=batch, use_cache=False)
    handle.remove()
    stats, decisions = accumulator.stats(), bound.plan
    count = kept_count(decisions.keep, limits(block.dims))
    plan = plan_layer(bank, stats, decisions.scorer, count, decisions.selector, decisions.assigner)
    return stats.values, plan


def test_wider_experts_are_what_the_batches_ran_through_and_zeros(folder: Path, tmp_path: Path, registry: Registry):
    """A merge that widens: a layer runs as wide as its own pools are, and is written as wide as the widest one."""
    saved(folder, "qwen2_moe")
    bound = dern(registry, merge="concatenate")
    stats, plans = streamed(folder, bound)
    live = load("qwen2_moe", folder)
    assert_same_plans(dernkit.compress(live, bound, BATCHES, registry=registry), plans)
    carry_out(folder, tmp_path / "out", bound, plans, stats)
    assert source(tmp_path / "out").outline[1][0].dims.width > 24
    assert torch.equal(
        logits(aligned(live), "qwen2_moe"), logits(aligned(load("qwen2_moe", tmp_path / "out")), "qwen2_moe")
    )


@pytest.mark.parametrize("family", ["deepseek_v3", "deepseek_v2_group"])
def test_groups_that_become_one_are_one_for_the_next_layer(
    folder: Path, tmp_path: Path, registry: Registry, family: str
):
    saved(folder, family)
    bound = dern(registry, groups="collapse")
    stats, plans = streamed(folder, bound)
    assert all(plan.one_group for plan in plans)
    live = load(family, folder)
    assert_same_plans(dernkit.compress(live, bound, BATCHES, registry=registry), plans)
    respected, _ = streamed(folder, dern(registry))
    last = max(stats)
    assert not torch.equal(stats[last]["sample"], respected[last]["sample"])


@every_kind
def test_one_decoder_layer_is_in_memory(folder: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch, family: str):
    saved(folder, family)
    loaded: list[str] = []
    most = 0
    load_, unload = Store.load, Store.unload

    def seen_load(store: Store, prefix: str) -> Any:
        nonlocal most
        loaded.append(prefix)
        most = max(most, len(loaded))
        return load_(store, prefix)

    def seen_unload(store: Store, prefix: str) -> None:
        loaded.remove(prefix)
        unload(store, prefix)

    monkeypatch.setattr(Store, "load", seen_load)
    monkeypatch.setattr(Store, "unload", seen_unload)
    streamed(folder, dern(registry))
    assert (most, loaded) == (1, [])


@pytest.mark.parametrize("family", ["mixtral", "zaya"])
def test_a_model_in_memory_is_as_before_when_a_component_fails(folder: Path, registry: Registry, family: str):
    """In a later layer, when the earlier ones have been compressed for it; no thread is left."""
    saved(folder, family)
    live, threads = load(family, folder), set(threading.enumerate())
    before, config = {name: tensor.clone() for name, tensor in live.state_dict().items()}, live.config.to_dict()
    bound = dern(registry)
    scorer = bound.plan.scorer

    class Breaks:
        name, requires = scorer.name, scorer.requires

        def score(self, bank: Any, stats: LayerStats) -> Tensor:
            scores = scorer.score(bank, stats)
            return scores if bank.dims.layer == 0 else scores / 0

    broken = replace(bound, plan=replace(bound.plan, scorer=Breaks()))
    with pytest.raises(ContractError, match="layer 1"):
        dernkit.compress(live, broken, BATCHES, registry=registry)
    after = live.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)
    assert live.config.to_dict() == config
    assert set(threading.enumerate()) <= threads
    assert_same_plans(dernkit.compress(live, bound, BATCHES, registry=registry), streamed(folder, bound)[1])
