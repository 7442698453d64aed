"""Laws of refits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dernkit.kernel.outputs import layer_output
from dernkit.testing.cases import Case, after_of, cases, plan_of
from dernkit.testing.law import Check, require
from dernkit.types import ExpertBank


def shape(refit: Any, case: Case) -> None:
    """New down projections are float32 [K, H, W], one for each kept expert."""
    down, wanted = _down(refit, case), tuple(after_of(case).down.shape)
    require(
        down.shape == wanted and down.dtype == torch.float32,
        f"return float32 down projections of shape {list(wanted)}",
        lambda: f"{down.dtype} {list(down.shape)}",
        "One projection for each kept expert, in their order.",
    )


def never_worse(refit: Any, case: Case) -> None:
    """On the sampled inputs the layer's output is no further from what it was than without the refit."""
    after = after_of(case)
    before, found = _error(case, after), _error(case, replace(after, down=_down(refit, case)))
    require(
        found <= before * (1 + 1e-4) + 1e-6,
        "leave the error on the sampled inputs as it is, or lower it",
        lambda: f"{found:.6g} where it was {before:.6g}",
        "Begin with the projections that surgery left, and penalise changes alone.",
    )


def _down(refit: Any, case: Case) -> Tensor:
    return refit.refit(case.bank, after_of(case), plan_of(case), case.stats)


def _error(case: Case, after: ExpertBank) -> float:
    """Sum of squares between the layer's output before and after."""
    seen, inputs = case.stats.router_inputs, case.stats["sample"].to(torch.float32)
    assert case.bank.route is not None and after.route is not None
    wanted = layer_output(case.bank, inputs, case.bank.route(seen))
    return float((layer_output(after, inputs, after.route(seen)) - wanted).square().sum(dtype=torch.float64))


def laws() -> list[Check]:
    """Of refits."""
    return [Check("refit", law, cases) for law in (shape, never_worse)]
