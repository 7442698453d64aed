"""Laws of evaluators that say what they measured on each document."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dernkit.errors import ContractError
from dernkit.kernel import calls
from dernkit.testing.law import Broken, Check, require
from dernkit.testing.laws.others import Made


def observed_numbers(evaluator: Any, given: Made) -> None:
    """Every metric has named documents, each once, with a group, a finite value and a weight above 0."""
    try:
        found = calls.observe(evaluator, _subject())
    except ContractError as error:
        raise Broken(f"must observe what its protocol says. Got '{error}' instead. Fix `observe`.") from None
    require(bool(found), "observe at least one metric", "none", "Return a mapping of names to Observations.")


def same_documents(evaluator: Any, given: Made) -> None:
    """Metrics, documents and groups are the same, in the same order, for every model."""
    subject = _subject()
    first, second = (evaluator.observe(each) for each in (subject, replace(subject, model=subject.original().model)))
    for name in [*first, *second]:
        there = name in first and name in second
        same = there and (first[name].documents, first[name].groups) == (second[name].documents, second[name].groups)
        got = f"others for metric '{name}'" if there else f"metric '{name}' for one of two models"
        require(same, "observe the same documents for every model", got, "Name them after the data alone.")


def adds_up(evaluator: Any, given: Made) -> None:
    """Where `evaluate` has a metric ``group/metric``, it is what the documents of the group add up to."""
    subject = _subject()
    results, shared = evaluator.evaluate(subject), 0
    for metric, seen in evaluator.observe(subject).items():
        for group, value in seen.by_group().items():
            name = f"{group}/{metric}"
            shared += name in results
            near = name not in results or math.isclose(results[name], value, rel_tol=1e-6, abs_tol=1e-9)
            got = f"{results.get(name)} for {name}, and documents that add up to {value}"
            require(near, "evaluate to what it observes", got, "Make the one from the other.")
    must = "name a metric 'group/metric' in `evaluate`, after a group and a metric of `observe`"
    require(shared > 0, must, lambda: f"only {', '.join(results)}", "Name both alike.")


def original_of_itself(evaluator: Any, given: Made) -> None:
    """A model whose original is the same model is measured as an original is."""
    subject = _subject()
    itself = replace(subject, original=None)
    alone = evaluator.observe(itself)
    for metric, seen in evaluator.observe(replace(subject, original=lambda: itself)).items():
        expected = alone[metric].by_group()
        got = f"{seen.by_group()} in place of {expected} for metric '{metric}'"
        require(seen.by_group() == expected, "find no difference of a model to itself", got, "Compare like with like.")


def _subject() -> Any:
    from dernkit.testing.runs import subject

    return subject()


def _observes(evaluator: Any) -> bool:
    return callable(getattr(type(evaluator), "observe", None))


def _models() -> Sequence[Made]:
    return [Made("a tiny model and its original")]


def laws() -> list[Check]:
    """Of evaluators that have `observe`."""
    found = (observed_numbers, same_documents, adds_up, original_of_itself)
    return [Check("evaluator", law, _models, only_if=_observes) for law in found]
