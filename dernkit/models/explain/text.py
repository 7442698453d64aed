"""A survey in plain sentences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dernkit.models.explain.explanation import Explanation
from dernkit.models.explain.survey import Finding, Survey
from dernkit.models.probe import candidate_fields

_ORDERS = {
    "no gate": "there is no gate",
    "separate": "gate and up are separate matrices",
    "concatenated": "rows of one matrix: all gate rows, then all up rows",
    "up first, concatenated": "rows of one matrix: all up rows, then all gate rows",
    "interleaved": "rows of one matrix: gate and up take turns",
    "up first, interleaved": "rows of one matrix: up and gate take turns",
    "unknown": "unknown",
}


def lines(survey: Survey, config: Any) -> Iterator[str]:
    """What was found, and what was not; ``config`` is the model's own one."""
    for finding in survey.findings:
        yield from _finding(finding, survey)
        yield ""
    if survey.config.to_dict() != config.to_dict():
        yield "Blocks were run with fewer or narrower experts than the model has; counts and widths are theirs."
    for problem in survey.not_explained:
        yield f"not explained: {problem.rstrip('.')}."
    if not survey.findings:
        yield "No block was found in which tokens use different parameters."


def _finding(finding: Finding, survey: Survey) -> Iterator[str]:
    found = finding.explanation
    yield f"{finding.path} ({type(finding.module).__name__})"
    yield f"  experts        {found.experts}{_fields(survey.config, found.experts)}; a token uses up to {found.top_k}"
    if found.width:
        read = f", reading vectors of {found.hidden}" if found.hidden else ""
        yield f"  width          {found.width}{_fields(survey.config, found.width)}{read}"
    yield f"  gate and up    {_ORDERS[found.order]}"
    yield from _weights(found)
    yield from _routing(found)
    yield from (f"  not explained: {what}" for what in found.unexplained)
    if survey.refusal is None and not finding.contradictions:
        yield "  The adapter's answers agree with all of this."


def _weights(found: Explanation) -> Iterator[str]:
    for weight in found.weights:
        notes = ["each expert is a module" if weight.stacked else f"experts along dimension {weight.dim}"]
        if weight.each > 1:
            notes = [f"{weight.each} entries of dimension {weight.dim} for each expert"]
        if weight.transposed:
            notes.append("transposed: inputs before outputs")
        if weight.spare:
            notes.append(f"{weight.spare} more at the end that no token uses")
        yield f"  {weight.role:<14} {weight.name} ({', '.join(notes)})"


def _routing(found: Explanation) -> Iterator[str]:
    if found.router is not None:
        extra = found.router_rows - found.experts
        yield f"  router         {found.router}{f' (and {extra} rows that belong to no expert)' if extra else ''}"
    for names, what in (
        (found.choice_biases, "takes part in the choice alone"),
        (found.logit_biases, "takes part in the choice and in the coefficients"),
        (found.scales, "weighs an expert's output, has no part in the choice"),
        (found.tables, "integers that decide the choice"),
        (found.upstream, "influences the choice, without an entry for each expert"),
    ):
        yield from (f"  routing        {name} ({what})" for name in names)


def _fields(config: Any, value: int) -> str:
    """The config's fields of this value."""
    names = [".".join(field) for field in candidate_fields(config, value)]
    return f" (config: {', '.join(names)})" if names else " (no config field has this value)"
