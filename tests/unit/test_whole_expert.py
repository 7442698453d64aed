"""Whole experts move to the kept expert of their group, and what is merged is what a hand would compute."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from dernkit.api import Match
from dernkit.builtin.groupings import DominantExpert
from dernkit.builtin.merges import WeightedAverage
from dernkit.builtin.routers import Slice
from dernkit.builtin.similarities import Cosine
from dernkit.builtin.whole_expert import WholeExpert
from dernkit.errors import ContractError, RecipeError
from dernkit.kernel.compress import compress_layer
from dernkit.kernel.planning import plan_from_scores
from dernkit.recipe import bind_recipe
from dernkit.registry import Registry
from dernkit.testing.banks import as_bank, copy_expert, random_bank, retained
from dernkit.types import ExpertBank, LayerPlan, LayerStats, Retention
from tests.unit.workbench import Workbench

NONE = LayerStats(0)
BANK = random_bank(5, 4, 3, layer=7)
GROUPED = retained(BANK, [1, 3], [0, 0, -1, 1, 0])


@dataclass(frozen=True)
class OneToOne:
    """Cosine pairs in which no neuron is used twice: the permutation that aligns two experts."""

    name: ClassVar[str] = "one-to-one"
    requires: ClassVar[frozenset[str]] = frozenset()

    def match(self, bank: ExpertBank, dropped: int, kept: torch.Tensor, stats: LayerStats) -> Match:
        unit = torch.nn.functional.normalize
        rows = unit(bank.segments(dropped).flatten(1), dim=1)
        found = [rows @ unit(bank.segments(expert).flatten(1), dim=1).T for expert in kept.tolist()]
        best = [linear_sum_assignment(pairs.numpy(), maximize=True)[1] for pairs in found]
        partner = torch.stack([torch.from_numpy(column) for column in best], dim=1)
        affinity = torch.stack([pairs.gather(1, partner[:, [k]])[:, 0] for k, pairs in enumerate(found)], dim=1)
        return Match(affinity, partner)


def merged(bank: ExpertBank, retention: Retention, assigner: WholeExpert) -> tuple[LayerPlan, ExpertBank]:
    moves = assigner.assign(bank, retention, NONE)
    dims = bank.dims
    plan = LayerPlan(dims.layer, dims.experts, dims.width, retention.scores, retention.kept, moves)
    return plan, as_bank(compress_layer(bank, plan, WeightedAverage(), Slice(), dims.width, 0), bank)


def test_every_neuron_of_a_grouped_expert_moves_to_its_own_index_in_the_kept_one() -> None:
    moves = WholeExpert().assign(BANK, GROUPED, NONE)
    assert moves.source.tolist() == [*range(4), *range(16, 20)], "expert 2 is in no group: it is discarded"
    assert moves.target.tolist() == [0] * 8
    assert moves.partner.tolist() == [0, 1, 2, 3] * 2
    assert moves.affinity.tolist() == [1.0] * 8


def test_an_alignment_says_which_neuron_belongs_to_which() -> None:
    bank = copy_expert(BANK, 1, 4, torch.tensor([2, 0, 3, 1]))
    moves = WholeExpert(alignment=Cosine()).assign(bank, GROUPED, NONE)
    assert moves.source.tolist() == [*range(4), *range(16, 20)]
    assert moves.partner[4:].tolist() == [2, 0, 3, 1]
    assert moves.affinity[4:].tolist() == [1.0] * 4


def test_the_average_is_weighted_by_the_scores_of_the_experts() -> None:
    retention = replace(GROUPED, scores=torch.tensor([0.5, 0.25, 9.0, 0.1, 0.0], dtype=torch.float64))
    _, after = merged(BANK, retention, WholeExpert())
    for name in ("gate", "up", "down"):
        by_hand = (0.25 * getattr(BANK, name)[1] + 0.5 * getattr(BANK, name)[0]) / 0.75
        torch.testing.assert_close(getattr(after, name)[0], by_hand, rtol=1e-6, atol=1e-6)


def test_an_expert_alone_in_its_group_keeps_its_bits() -> None:
    _, after = merged(BANK, GROUPED, WholeExpert())
    assert all(torch.equal(getattr(after, name)[1], getattr(BANK, name)[3]) for name in ("gate", "up", "down"))


def test_an_expert_merged_with_itself_is_itself() -> None:
    same = copy_expert(copy_expert(BANK, 1, 0, torch.arange(4)), 1, 4, torch.arange(4))
    for assigner in (WholeExpert(), WholeExpert(alignment=Cosine())):
        _, after = merged(same, GROUPED, assigner)
        for name in ("gate", "up", "down"):
            torch.testing.assert_close(getattr(after, name)[0], getattr(same, name)[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", [{"gated": False}, {"bias": True}, {}], ids=["plain", "bias", "gated"])
def test_permuted_copies_merge_to_the_same_function_when_they_are_aligned_and_only_then(kind: dict) -> None:
    bank = random_bank(5, 6, 4, **kind)
    for expert, seed in ((0, 1), (4, 2)):
        bank = copy_expert(bank, 1, expert, torch.randperm(6, generator=torch.Generator().manual_seed(seed)))
    inputs = torch.randn(20, 4, generator=torch.Generator().manual_seed(3))
    _, aligned = merged(bank, GROUPED, WholeExpert(alignment=OneToOne()))
    _, unaligned = merged(bank, GROUPED, WholeExpert())
    before = bank.output(1, inputs)
    torch.testing.assert_close(aligned.output(0, inputs), before, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(unaligned.output(0, inputs), before, rtol=1e-2, atol=1e-2)


def test_nothing_grouped_moves_nothing() -> None:
    assert len(WholeExpert().assign(BANK, retained(BANK, [1, 3], [-1, 0, -1, 1, -1]), NONE)) == 0


def test_experts_without_groups_are_refused() -> None:
    with pytest.raises(RecipeError) as caught:
        WholeExpert().assign(BANK, retained(BANK, [1, 3]), NONE)
    assert str(caught.value) == (
        "assigner 'whole-expert', layer 7: must have a selector that groups experts. "
        "Got experts without groups instead. Set plan.select to 'dominant-expert' or 'pseudo-pruning'."
    )


def test_an_alignment_is_held_to_its_contract() -> None:
    @dataclass(frozen=True)
    class Broken:
        name: ClassVar[str] = "broken"
        requires: ClassVar[frozenset[str]] = frozenset()

        def match(self, bank: ExpertBank, dropped: int, kept: torch.Tensor, stats: LayerStats) -> Match:
            return Match(torch.zeros(4, 2), torch.zeros(4, 2, dtype=torch.int64))

    with pytest.raises(ContractError, match=r"^similarity 'broken', layer 7: affinity must .*\[4, 1\] .*law shape"):
        WholeExpert(alignment=Broken()).assign(BANK, GROUPED, NONE)


def test_what_the_alignment_reads_is_required() -> None:
    @dataclass(frozen=True)
    class Reading:
        name: ClassVar[str] = "reading"
        requires: ClassVar[frozenset[str]] = frozenset({"routed"})

        def match(self, bank: ExpertBank, dropped: int, kept: torch.Tensor, stats: LayerStats) -> Match: ...

    assert WholeExpert(alignment=Reading()).requires == {"routed"}
    assert WholeExpert().requires == frozenset()


def test_a_plan_with_a_grouping_selector_moves_all_but_the_kept() -> None:
    bank = random_bank(6, 4, 3)
    scores = torch.arange(6, dtype=torch.float64)
    plan = plan_from_scores(bank, NONE, scores, 2, DominantExpert(), WholeExpert(alignment=Cosine()))
    assert plan.kept.tolist() == [4, 5]
    assert len(plan.assignment) == 4 * 4 and plan.assignment.source.tolist() == list(range(16))


def test_a_recipe_whose_selector_does_not_group_is_a_problem() -> None:
    plan = {"keep": 1, "score": {"use": "random"}, "assign": {"use": "whole-expert"}}
    with pytest.raises(RecipeError) as caught:
        bind_recipe(
            {"dernkit": 1, "plan": plan, "apply": {"merge": {"use": "weighted-average"}}},
            Registry.load(entry_points=False),
        )
    assert str(caught.value).split("\n") == [
        "1 problem in the recipe",
        "plan.assign: 'whole-expert' needs a selector that groups experts. Got 'top-score' instead. "
        "Set plan.select; installed ones that group: dominant-expert, pseudo-pruning.",
    ]


def test_whole_experts_are_merged_from_checkpoint_to_checkpoint(tmp_path: Path) -> None:
    bench = Workbench(tmp_path, "qwen3_moe")
    bench.write(assign={"use": "whole-expert", "alignment": {"use": "cosine"}}, merge={"use": "weighted-average"})
    bench.finish("plan.select={use: dominant-expert}")
    plan = (bench.out / "plan.json").read_text()
    assert '"discarded_segments": 0' in plan and '"moves": 0' not in plan


def test_a_grouping_selector_sees_the_weights_of_a_plan_that_only_prunes(tmp_path: Path) -> None:
    bench = Workbench(tmp_path)
    bench.finish("plan.select={use: pseudo-pruning}")
    assert '"moves": 0' in (bench.out / "plan.json").read_text()
