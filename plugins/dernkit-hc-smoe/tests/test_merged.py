"""HC-SMoE from the clusters to the checkpoint: what is merged is what a hand would compute."""

from pathlib import Path

import reference
import torch
import yaml
from dernkit_hc_smoe import Agglomerative
from workshop import recipe_with, result_of

from dernkit.builtin.merges import WeightedAverage
from dernkit.builtin.routers import Slice
from dernkit.builtin.scorers import RouterFrequency
from dernkit.builtin.whole_expert import WholeExpert
from dernkit.kernel.compress import compress_layer
from dernkit.kernel.planning import plan_layer
from dernkit.testing.banks import copy_expert, random_bank, random_stats

PARTS = ("gate", "up", "down")


def test_a_merged_expert_is_the_frequency_weighted_average_and_a_lone_one_keeps_its_bits() -> None:
    bank = random_bank(7, 4, 3)
    stats = random_stats(bank)
    plan = plan_layer(bank, stats, RouterFrequency(), 3, Agglomerative(), WholeExpert())
    after = compress_layer(bank, plan, WeightedAverage(weights="score"), Slice(), 4, 0)
    origin = plan.assignment.source // 4
    sizes = []
    for position, kept in enumerate(plan.kept.tolist()):
        members = [kept, *origin[plan.assignment.target == position].unique().tolist()]
        sizes.append(len(members))
        for name in PARTS:
            theta, merged = getattr(bank, name), getattr(after, name)[position]
            rows = [theta[e].flatten().double().tolist() for e in members]
            by_hand = reference.frequency_average(rows, stats["routed"][members].tolist())
            torch.testing.assert_close(merged.flatten().double(), torch.tensor(by_hand).double(), rtol=1e-5, atol=1e-6)
            assert len(members) > 1 or torch.equal(merged, theta[kept])
    assert sum(sizes) == 7 and 1 in sizes and max(sizes) > 1


def test_copies_of_an_expert_are_one_cluster_and_merge_to_it() -> None:
    bank = random_bank(6, 4, 3)
    for copied, expert in ((0, 3), (1, 4), (2, 5)):
        bank = copy_expert(bank, copied, expert, torch.arange(4))
    stats = random_stats(bank)
    plan = plan_layer(bank, stats, RouterFrequency(), 3, Agglomerative(), WholeExpert())
    after = compress_layer(bank, plan, WeightedAverage(), Slice(), 4, 0)
    assert sorted(expert % 3 for expert in plan.kept.tolist()) == [0, 1, 2]
    for name in PARTS:
        torch.testing.assert_close(getattr(after, name), getattr(bank, name)[plan.kept], rtol=1e-6, atol=1e-7)


def test_the_recipe_runs_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    model, plan = result_of(tmp_path, recipe_with(Path(__file__).parents[1] / "recipes/hc-smoe.yaml"))
    assert model.config.num_local_experts == 4
    assert all(layer["discarded_segments"] == 0 < layer["moves"] for layer in plan["layers"].values())
    logits = model(torch.arange(3, 20)[None]).logits
    assert bool(logits.isfinite().all())


def test_every_option_runs_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    recipe = recipe_with(Path(__file__).parents[1] / "recipes/hc-smoe.yaml")
    for i, features in enumerate(("routed-outputs", "weights", "router-logits")):
        recipe["plan"]["select"] = {"use": "agglomerative", "features": features, "linkage": "ward"}
        folder = tmp_path / str(i)
        folder.mkdir()
        assert result_of(folder, yaml.safe_load(yaml.safe_dump(recipe)))[0].config.num_local_experts == 4
