"""The explanation of every family of transformers is the truth, or says what it did not find."""

from __future__ import annotations

import re
from typing import Any

import pytest
from torch import nn

from dernkit.models.explain.survey import Finding, Survey, survey
from dernkit.models.layouts import Declared
from dernkit.models.probe import build_on_meta
from dernkit.models.universal import Universal
from tests.families import FAMILIES, count, make_config, model_class

NOT_EXPLAINED = {
    "nllb_moe": None,
    "doge": ("which matrix has a row for each expert that decides about it alone",),
}
"""What the experiment does not find: NLLB's experts (in transformers 5.23 one expert gets all tokens), Doge's router
(its rows are shared by experts: product keys).
"""
UNDECLARED: dict[str, tuple[str, bool, bool]] = {
    "llama4_text": ("concatenated", True, True),
    "longcat_flash": ("concatenated", False, False),
    "dbrx": ("separate", False, True),
    "jetmoe": ("concatenated", False, False),
    "step3p7_text": ("concatenated", False, False),
    "switch_transformers": ("no gate", False, False),
}
"""Family -> (order, rows transposed, down transposed)."""
ROUTERS = {"longcat_flash": 3, "inkling_text": 2, "zaya": 1}
"""Family -> rows of its router that belong to no routed expert."""
QUICK = ("mixtral", "deepseek_v3", "gpt_oss", "dbrx", "longcat_flash", "switch_transformers")
_ROUTER = re.compile(
    r"(^|\.)(gate|router)(\.(weight|wg\.weight|gate\.weight|layer\.weight|proj\.weight|classifier\.weight))?$"
)


def marked(name: str) -> Any:
    return pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow])


def surveyed(name: str) -> Survey:
    return survey(model_class(name), make_config(name), [Universal()])


@pytest.mark.parametrize("name", [marked(name) for name in FAMILIES if name not in NOT_EXPLAINED])
def test_the_explanation_is_the_truth(name: str):
    result = surveyed(name)
    assert result.findings
    finding = result.findings[0]
    found = finding.explanation
    assert [finding.contradictions for finding in result.findings] == [()] * len(result.findings)
    assert (found.experts, found.width, found.unexplained) == (count(name), 24, ())
    assert found.top_k == (1 if FAMILIES[name].top_1 or FAMILIES[name].top_k is None else 2)
    assert layout(finding) == truth(name)
    check_routing(name, finding)


def layout(finding: Finding) -> tuple[str, bool, bool]:
    weights = {weight.role: weight.transposed for weight in finding.explanation.weights}
    rows = {weights[role] for role in ("gate and up", "gate", "up") if role in weights}
    assert len(rows) == 1
    return finding.explanation.order, rows.pop(), weights["down"]


def truth(name: str) -> tuple[str, bool, bool]:
    """What transformers declares, or for what it does not declare, the table."""
    if name in UNDECLARED:
        return UNDECLARED[name]
    model = build_on_meta(model_class(name), make_config(name))
    experts: Any = next(module for module in model.modules() if Declared().claims(module))
    order = "concatenated" if experts.is_concatenated else "interleaved"
    return (order if experts.has_gate else "no gate"), experts.is_transposed, experts.is_transposed


def check_routing(name: str, finding: Finding) -> None:
    found = finding.explanation
    assert found.router is not None
    assert found.router_rows == found.experts + ROUTERS.get(name, 0)
    assert "out_proj" in found.router if name == "zaya" else _ROUTER.search(found.router)
    state = (*finding.module.named_parameters(), *finding.module.named_buffers())
    corrections = {
        tensor for tensor, _ in state if re.search(r"correction_bias$|expert_bias$|balancing_biases$", tensor)
    }
    if name == "ernie4_5_vl_moe_text":
        corrections = {tensor for tensor in corrections if tensor.startswith("text_moe.")}
    assert set(found.choice_biases) == corrections
    declared = bool(getattr(_experts(finding.module), "has_bias", False))
    biases = {weight.role for weight in found.weights if weight.role.endswith("bias")}
    assert biases == ({"gate and up bias", "down bias"} if declared else set())


def _experts(block: nn.Module) -> nn.Module | None:
    return next((module for module in block.modules() if Declared().claims(module)), None)


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_EXPLAINED)
def test_what_is_not_explained_is_said(name: str):
    result = surveyed(name)
    assert result.refusal is not None
    assert [finding.explanation.unexplained for finding in result.findings] == (
        [NOT_EXPLAINED[name]] if NOT_EXPLAINED[name] else []
    )
