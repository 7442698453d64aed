"""Calibration: true coefficients, additive sums, causal attention, and layer by layer = the model's own forward."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from dernkit.models.replay import replay
from dernkit.models.stack import decoder_stack
from dernkit.progress import Silent
from dernkit.stages.calibrate import batched, calibrate_checkpoint
from dernkit.testing.checkpoints import FAMILIES, save_tiny, tokens
from dernkit.types import STATISTICS, LayerStats
from tests.laws.pipeline import source
from tests.reference.statistics import statistics

EVERYTHING = frozenset(STATISTICS)
every_family = pytest.mark.parametrize("family", FAMILIES)


def calibrate(folder: Path, ids: torch.Tensor, *, requires: frozenset[str] = EVERYTHING, **options: Any):
    return calibrate_checkpoint(
        source(folder), batched(ids, 2), requires, sample_size=12, seed=7, progress=Silent(), **options
    )


def block_inputs(model: Any, ids: torch.Tensor) -> dict[int, torch.Tensor]:
    """What each MoE block sees in the model's own forward, [n, H] per layer."""
    seen: dict[int, torch.Tensor] = {}
    layers = {
        i: layer.mlp for i, layer in enumerate(model.model.layers) if "experts" in dict(layer.mlp.named_children())
    }
    handles = [
        block.register_forward_pre_hook(lambda _, args, i=i: seen.update({i: args[0].flatten(0, -2)}))
        for i, block in layers.items()
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return seen


@every_family
def test_every_statistic_equals_the_float64_reference(tmp_path: Path, family: str):
    model = save_tiny(tmp_path, family)
    ids = tokens(2, 16)
    found = calibrate(tmp_path, ids)
    seen = block_inputs(model, ids)
    assert found.keys() == seen.keys()
    for layer, inputs in seen.items():
        with torch.no_grad():
            expected = statistics(model.config, model.model.layers[layer].mlp, inputs)
        assert found[layer].tokens == 32
        assert found[layer]["routed"].sum() == 64
        for name, value in expected.items():
            error = (found[layer][name] - value).reshape(len(value), -1).norm(dim=1)
            assert bool((error <= 1e-6 * value.reshape(len(value), -1).norm(dim=1)).all()), name


@every_family
def test_statistics_of_two_parts_add_up_to_those_of_the_whole(tmp_path: Path, family: str):
    save_tiny(tmp_path, family)
    ids = tokens(4, 16)
    whole = calibrate(tmp_path, ids)
    parts = [calibrate(tmp_path, ids[:2]), calibrate(tmp_path, ids[2:], first_token=32)]
    for layer, stats in whole.items():
        joined: LayerStats = parts[0][layer] + parts[1][layer]
        assert joined.tokens == stats.tokens
        assert torch.equal(joined["sample"], stats["sample"])
        for name in EVERYTHING - {"sample"}:
            torch.testing.assert_close(joined[name], stats[name], rtol=1e-12, atol=0)


def test_the_reservoir_is_a_seeded_sample_of_the_layer_inputs(tmp_path: Path):
    model = save_tiny(tmp_path, "mixtral")
    ids = tokens(4, 16)
    seen = torch.cat([block_inputs(model, batch)[1] for batch in ids.split(2)])
    stats = calibrate(tmp_path, ids)[1]
    rows = [int((seen == row).all(dim=1).nonzero()) for row in stats["sample"]]
    assert len(set(rows)) == 12
    assert torch.equal(calibrate(tmp_path, ids)[1]["sample"], stats["sample"])


@every_family
def test_only_what_is_required_is_collected(tmp_path: Path, family: str):
    save_tiny(tmp_path, family)
    found = calibrate(tmp_path, tokens(2, 8), requires=frozenset({"gate_sum"}))
    assert all(set(stats.values) == {"gate_sum"} for stats in found.values())


@every_family
def test_changing_the_last_token_changes_no_earlier_layer_input(tmp_path: Path, family: str):
    save_tiny(tmp_path, family)
    ids = tokens(2, 16)
    other = ids.clone()
    other[:, -1] = (other[:, -1] + 1) % 90 + 3
    inputs = [layer_inputs(tmp_path, [batch]) for batch in (ids, other)]
    for mine, theirs in zip(*inputs, strict=True):
        # Not bit for bit: an expert with another number of tokens makes another matrix product.
        torch.testing.assert_close(mine[0][:, :-1], theirs[0][:, :-1], rtol=1e-5, atol=1e-5)
        assert (mine[0][:, -1] - theirs[0][:, -1]).abs().max() > 1e-2


@every_family
def test_layer_by_layer_is_the_models_own_forward(tmp_path: Path, family: str):
    """Bit for bit, with batches of different shapes."""
    model = save_tiny(tmp_path, family)
    model.set_experts_implementation("eager")
    batches = [tokens(2, 16), tokens(1, 9, seed=3)]
    streamed = layer_inputs(tmp_path, batches)
    for position, ids in enumerate(batches):
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states
        for layer, inputs in enumerate(streamed):
            assert torch.equal(inputs[position], hidden[layer])


def layer_inputs(folder: Path, batches: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Hidden states that enter every decoder layer, per layer and batch, as the replay makes them."""
    store, blocks = source(folder).open()
    stack = decoder_stack(store.model, blocks)
    store.load_around(stack.owner_path, stack.paths)
    seen: list[list[torch.Tensor]] = [[] for _ in stack.layers]

    @contextmanager
    def observe(layer: int):
        hook = stack.layers[layer].register_forward_pre_hook(lambda _, args: seen[layer].append(args[0].clone()))
        yield
        hook.remove()

    replay(stack.owner, stack.layers, stack.paths, batches, store, observe, lambda layer, n: None)
    return seen
