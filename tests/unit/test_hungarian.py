import threading
import time
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from dernkit.builtin.activation_similarities import ActivationCorrelation
from dernkit.builtin.expert_similarities import ExpertOutput
from dernkit.builtin.matched import Hungarian
from dernkit.builtin.similarities import Cosine
from dernkit.errors import ContractError, RecipeError
from dernkit.kernel import one_to_one as module
from dernkit.kernel.matching import best_match, cosines, dots
from dernkit.kernel.one_to_one import one_to_one, one_to_one_each
from dernkit.recipe import bind_recipe
from dernkit.registry import Registry
from dernkit.testing.banks import random_bank, random_stats

KEPT = torch.tensor([0, 2])


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_total_is_never_below_that_of_any_other_permutation() -> None:
    affinity = random(30, 30)
    partner = one_to_one(affinity)
    assert sorted(partner.tolist()) == list(range(30))
    total = affinity[torch.arange(30), partner].sum()
    for seed in range(200):
        other = torch.randperm(30, generator=torch.Generator().manual_seed(seed))
        assert affinity[torch.arange(30), other].sum() <= total
    # No swap of two partners gains: a local optimum, at the least.
    swapped = affinity[:, partner]
    gain = swapped + swapped.T - swapped.diagonal()[:, None] - swapped.diagonal()
    assert float(gain.max()) <= 1e-6


def test_a_neuron_goes_without_its_best_where_that_serves_the_whole() -> None:
    assert one_to_one(torch.tensor([[0.9, 0.8], [0.9, 0.1]])).tolist() == [1, 0]


def test_unequal_sizes_are_refused() -> None:
    with pytest.raises(
        ContractError, match=r"must have the same number of neurons. Got 4 and 5 instead. Match experts of one width."
    ):
        one_to_one(random(4, 5))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_affinities_must_be_finite(value: float) -> None:
    affinity = random(4, 4)
    affinity[1, 2] = value
    with pytest.raises(ContractError, match="one-to-one matching: affinities must be finite"):
        one_to_one(affinity)


@pytest.mark.parametrize("compare", [best_match, cosines, dots])
def test_experts_of_different_parts_are_refused(compare) -> None:
    with pytest.raises(ContractError, match=r"must have the same parts and features\. Got 12 and 8 numbers each"):
        compare(random(3, 12), random(3, 8))


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_threads_change_nothing(workers: int) -> None:
    matrices = [random(40, 40, seed=seed) for seed in range(7)]
    copies = [matrix.clone() for matrix in matrices]
    found = one_to_one_each(iter(matrices), workers)
    for matrix, copy, (affinity, partner) in zip(matrices, copies, found, strict=True):
        assert torch.equal(partner, one_to_one(matrix)) and torch.equal(matrix, copy)
        assert torch.equal(affinity, matrix.gather(1, partner[:, None])[:, 0])


def test_no_more_matrices_than_threads_wait_to_be_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    lock, solved, most = threading.Lock(), [0], [0]
    solve = module.one_to_one

    def slow(affinity: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        partner = solve(affinity)
        with lock:
            solved[0] += 1
        return partner

    def matrices():
        for made in range(1, 9):
            with lock:
                most[0] = max(most[0], made - solved[0])
            yield random(5, 5)

    monkeypatch.setattr(module, "one_to_one", slow)
    assert len(one_to_one_each(matrices(), 2)) == 8
    assert most[0] <= 3


def test_an_error_in_a_thread_comes_out() -> None:
    with pytest.raises(ContractError, match="one-to-one matching"):
        one_to_one_each([random(4, 4), random(4, 5), random(4, 4)], 2)


def test_every_kept_expert_has_a_matching_of_its_own() -> None:
    bank = random_bank(3, 12, 4)
    match = Hungarian().match(bank, 1, KEPT, random_stats(bank))
    for column, expert in enumerate(KEPT.tolist()):
        pairs = Cosine().pairs(bank, 1, expert, random_stats(bank))
        assert torch.equal(match.partner[:, column], one_to_one(pairs))
    best = Cosine().match(bank, 1, KEPT, random_stats(bank))
    assert bool((match.affinity <= best.affinity).all() and (match.affinity < best.affinity).any())


def test_it_requires_and_sees_what_its_base_requires() -> None:
    assert Hungarian().requires == frozenset()
    assert Hungarian(base=ActivationCorrelation()).requires == {"sample"}

    @dataclass(frozen=True)
    class Watching:
        name: ClassVar[str] = "watching"
        requires: ClassVar[frozenset[str]] = frozenset({"routed"})

        def match(self, bank, dropped, kept, stats): ...

        def pairs(self, bank, dropped, other, stats) -> torch.Tensor:
            assert set(stats.values) == {"routed"}
            return random(bank.dims.width, bank.dims.width)

    bank = random_bank()
    assert Hungarian(base=Watching()).match(bank, 1, KEPT, random_stats(bank)).scale is None


@pytest.mark.parametrize("base", [ExpertOutput(), Hungarian()], ids=repr)
def test_the_base_must_compare_all_pairs(base) -> None:
    with pytest.raises(ValueError, match=rf"base: must be a similarity that .* Got '{base.name}' instead"):
        Hungarian(base=base)


def test_a_recipe_with_another_base_is_refused() -> None:
    data = {
        "dernkit": 1,
        "calibrate": {"source": {"use": "text-file", "path": "unused.txt"}, "sequences": 4, "length": 16},
        "plan": {
            "keep": 0.5,
            "score": {"use": "gate-mass"},
            "assign": {"use": "affinity", "similarity": {"use": "hungarian", "base": {"use": "router-logits"}}},
        },
        "apply": {"merge": {"use": "weighted-average"}},
    }
    with pytest.raises(RecipeError, match=r"base: must be a similarity .* Got 'router-logits' instead"):
        bind_recipe(data, Registry.load(entry_points=False))
