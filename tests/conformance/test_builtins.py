"""Every built-in component keeps the laws of its kind: with default options, and with each choice and flag turned."""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dernkit.builtin.evaluators import Fidelity, Perplexity
from dernkit.builtin.generation import Generation
from dernkit.builtin.merges import SphericalKMeans
from dernkit.builtin.similarities import Cosine
from dernkit.builtin.sources import JsonLines, TextFile
from dernkit.components import Component
from dernkit.registry import Registry
from dernkit.shapes import Choice, Flag
from dernkit.testing import parametrize_with_checks
from dernkit.testing.kit import has_defaults
from dernkit.testing.law import label

HERE = Path(__file__).parent
BUILTINS = list(Registry.load(entry_points=False).components())

EXAMPLES = [
    TextFile(HERE / "texts.jsonl"),
    JsonLines(HERE / "texts.jsonl"),
    Perplexity(HERE / "texts.jsonl", length=32),
    Fidelity(HERE / "texts.jsonl", length=32),
    Generation(HERE / "texts.jsonl", prompts=5, prompt_length=16, new_tokens=8),
    Cosine(parts=("gate", "up", "down")),
    SphericalKMeans(iterations=1),
]
"""Components whose options have no defaults, and options that are neither a choice nor a flag."""

UNCHECKED = {
    ("source", "datasets"): "reads from the hub",
    ("evaluator", "lm-eval"): "seconds per call, and tasks on disk; tests/unit/test_lm_eval.py runs it",
}

_BY_PLACE = "whole experts are compared, and neurons paired by their place"
WHOLE = {"dropped_neurons": _BY_PLACE, "kept_neurons": _BY_PLACE, "self_partner": _BY_PLACE}
_DRAWN = "draws first centroids by their place"
DRAWN = {"arrival_order": _DRAWN, "neuron_permutation": _DRAWN}
EXPECTED = {
    "Random": {"expert_permutation": "draws a number for each place, not for each expert"},
    "SphericalKMeans(init=random)": DRAWN,
    "KMeansActivation(init=random)": DRAWN,
    "Global(normalise=rank)": {"layer_order": "layers have the same ranks, and ties go to the first of them"},
    "WholeExpert": {"neuron_permutation": "neurons move to those in the same place"},
    "ExpertOutput": WHOLE,
    "RouterLogits": WHOLE,
    "ExpertWeights": {**WHOLE, "self_match": "weights are compared neuron by neuron as they stand"},
}
"""What is broken on purpose, strictly."""


def turned(component: Component) -> Iterator[Any]:
    """The component with its defaults, and once for every other value of every choice and flag."""
    default = component.cls()
    yield default
    for option in component.options:
        values = option.shape.values if isinstance(option.shape, Choice) else ()
        if isinstance(option.shape, Flag):
            values = (not option.default,)
        for value in values:
            with contextlib.suppress(ValueError):  # says itself which options do not go together
                yield dataclasses.replace(default, **{option.name: value})


WITH_DEFAULTS = [each for component in BUILTINS if has_defaults(component.cls) for each in turned(component)]
COMPONENTS = list({label(each): each for each in [*WITH_DEFAULTS, *EXAMPLES]}.values())


@parametrize_with_checks(COMPONENTS, expected_failures=EXPECTED)
def test_built_in_components_keep_the_laws_of_their_kind(component: Any, check: Any) -> None:
    check(component)


@pytest.mark.parametrize("component", BUILTINS, ids=lambda component: component.name)
def test_every_built_in_component_is_checked_or_there_is_a_reason(component: Component) -> None:
    checked = any(type(each) is component.cls for each in COMPONENTS)
    assert checked != ((component.kind, component.name) in UNCHECKED)
