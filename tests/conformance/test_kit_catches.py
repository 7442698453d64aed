"""Each law is broken by a component that is wrong in one thing, and the sentence says which component and which law."""

from __future__ import annotations

import re
from typing import Any

import pytest

from dernkit.errors import ContractError
from dernkit.testing import all_checks, checks_of
from tests.conformance import broken

SCORER = ("determinism", "global_randomness", "no_mutation", "only_declared_statistics", "error_sentences", "shape")
SCORER += ("dtype", "finite", "no_tokens", "expert_permutation", "neuron_permutation", "repeated_tokens")
SELECTOR = ("kept_count", "kept_order", "router_groups", "keeps_scores", "own_group", "expert_permutation")
ASSIGNER = ("move_columns", "dropped_sources", "in_range", "nothing_dropped", "expert_permutation")
SIMILARITY = ("match_shape", "kept_order", "dropped_neurons", "kept_neurons", "self_match", "self_partner", "in_range")
MERGE = ("shape", "dtype", "zero_weights", "exact_copies", "arrival_order", "neuron_permutation")
REFIT = ("shape", "never_worse")
ROUTER = ("shape", "untouched_rows", "expert_permutation")
BUDGET = ("measures", "in_range", "within_budget", "keep_all", "layer_order", "expert_permutation")
SOURCE = ("shape", "dtype", "in_range", "too_short", "determinism")
OBSERVER = ("observed_numbers", "same_documents", "adds_up", "original_of_itself")
ARCHITECTURE = ("model_type", "model_of_config", "listed_conversions")

CASES: list[tuple[Any, str]] = [
    *((broken.BrokenScorer(law), law) for law in SCORER),
    (broken.BrokenScorer("only_declared_statistics_quietly"), "only_declared_statistics"),
    (broken.Unbounded(), "valid_class"),
    (broken.Rounded(), "options_round_trip"),
    (broken.Stateful(), "copies"),
    (broken.Falls(), "no_tokens"),
    *((broken.BrokenSelector(law), law) for law in SELECTOR),
    *((broken.BrokenAssigner(law), law) for law in (*ASSIGNER, "neuron_permutation")),
    *((broken.BrokenSimilarity(law), law) for law in SIMILARITY),
    (broken.BrokenPairs("pairs"), "pairs"),
    *((broken.BrokenMerge(law), law) for law in MERGE),
    *((broken.BrokenRouter(law), law) for law in ROUTER),
    *((broken.BrokenRefit(law), law) for law in REFIT),
    *((broken.BrokenBudget(law), law) for law in BUDGET),
    *((broken.BrokenSource(law), law) for law in SOURCE),
    (broken.BrokenEvaluator(), "named_numbers"),
    *((broken.BrokenObserver(law), law) for law in OBSERVER),
    (broken.BrokenObserver("adds_up_to_nothing"), "adds_up"),
    (broken.Trains(), "no_mutation"),
    (broken.Empty(), "text"),
    (broken.Consumes(), "no_mutation"),
    (broken.BrokenAdapter("only_its_own"), "only_its_own"),
    (broken.BrokenAdapter("blocks_round_trip"), "blocks_round_trip"),
    *((broken.BrokenArchitecture(law), law) for law in ARCHITECTURE),
]
MALFORMED = {"move_columns", "dropped_sources", "in_range", "shape", "kept_count"}
"""What is malformed cannot be compared after a permutation either."""
PERMUTED = {"expert_permutation", "neuron_permutation", "kept_neurons", "repeated_tokens", "never_worse"}


def failures(component: Any) -> dict[str, str]:
    """The laws that the component breaks, each with its sentence."""
    found = {}
    for check in checks_of(component):
        try:
            check(component)
        except ContractError as error:
            found[check.id] = str(error)
            assert (error.law, error.component) == (check.id, component.name)
    return found


def name(case: Any) -> str:
    return f"{type(case).__name__}" if not isinstance(case, str) else case


@pytest.mark.parametrize(("component", "law"), CASES, ids=name)
def test_a_component_that_breaks_a_law_fails_that_law(component: Any, law: str) -> None:
    found = failures(component)
    follows = PERMUTED if law in MALFORMED else {"options_round_trip"} if law == "valid_class" else set()
    assert found.keys() - follows == {law}, found
    assert re.match(rf"\w+ '{component.name}', law {law}, .*: .*must .* Got .* instead\. \w", found[law]), found[law]


def test_every_law_of_a_kind_is_caught_somewhere() -> None:
    """Laws that all kinds share are shown on one kind; the others each on their own."""
    shared = {"valid_class", "options_round_trip", "copies", "only_declared_statistics", "finite"}
    shared |= {"determinism", "global_randomness", "no_mutation", "error_sentences"}
    caught = {(check.kind, law) for component, law in CASES for check in checks_of(component)[:1]}
    assert shared <= {law for _, law in caught}
    assert {(check.kind, check.id) for check in all_checks() if check.id not in shared} <= caught


@pytest.mark.parametrize("component", broken.GOOD, ids=lambda component: type(component).__name__)
def test_a_component_without_a_fault_breaks_no_law(component: Any) -> None:
    assert failures(component) == {}
