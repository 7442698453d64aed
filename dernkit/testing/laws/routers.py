"""Laws of routers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dernkit.testing.banks import permute_stats
from dernkit.testing.cases import Case, cases, different, expert_order, inverse, plan_of, rows_of
from dernkit.testing.law import Check, require
from dernkit.types import Assignment


def shape(router: Any, case: Case) -> None:
    """New rows are float32 [K, ·], one for each kept expert."""
    rows, wanted = _rows(router, case), (len(case.kept), rows_of(case).shape[1])
    require(
        rows.shape == wanted and rows.dtype == torch.float32,
        f"return float32 rows of shape {list(wanted)}",
        lambda: f"{rows.dtype} {list(rows.shape)}",
        "One row for each kept expert, in their order.",
    )


def untouched_rows(router: Any, case: Case) -> None:
    """The row of a kept expert to which nothing moves keeps its bits."""
    plan, rows = plan_of(case), rows_of(case)
    alone = torch.bincount(plan.assignment.target, minlength=len(case.kept)) == 0
    for what, each, places in (
        ("expert to which nothing moves", plan, alone.nonzero().flatten()),
        ("expert of a plan without moves", replace(plan, assignment=Assignment.empty()), torch.arange(len(case.kept))),
    ):
        new = router.update(rows.clone(), each, case.stats)[places]
        before = rows[case.kept[places]]
        require(
            torch.equal(new, before),
            f"leave the row of an {what} as it is, bit for bit",
            lambda new=new, before=before: f"one that differs by {float((new - before).abs().max()):.3g}",
            "Change only the rows of experts that receive something.",
        )


def expert_permutation(router: Any, case: Case) -> None:
    """Experts in another order have the same rows in that order."""
    order, plan, dims = expert_order(case.bank), plan_of(case), case.bank.dims
    place = inverse(order)
    kept, rank = place[case.kept].sort()
    moves = plan.assignment
    source = place[moves.source // dims.width] * dims.width + moves.source % dims.width
    assignment = replace(moves, source=source, target=inverse(rank)[moves.target])
    other = replace(plan, scores=case.scores[order], kept=kept, assignment=assignment)
    found = router.update(rows_of(case)[order], other, permute_stats(case.stats, order))
    expected = _rows(router, case)[rank]
    distance = float((found - expected).abs().max())
    require(
        distance <= 1e-4 * max(float(expected.abs().max()), 1.0),
        "make the same rows in any order of the experts",
        f"rows that differ by {distance:.3g}",
        "Use no expert's number.",
    )


def _rows(router: Any, case: Case) -> torch.Tensor:
    return router.update(rows_of(case), plan_of(case), case.stats)


def laws() -> list[Check]:
    """Of routers."""
    checks = [Check("router", law, cases) for law in (shape, untouched_rows)]
    return [*checks, Check("router", expert_permutation, different)]
