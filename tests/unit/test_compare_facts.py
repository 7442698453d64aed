"""How alike experts are."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dernkit.compare import facts
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.testing.checkpoints import tiny_model


def test_similarity_is_the_mean_of_best_cosines_by_the_formula() -> None:
    blocks = find_blocks(tiny_model("mixtral", num_hidden_layers=1), [Universal()])
    found = facts.similarity(blocks)
    bank = blocks[0].bank()
    vectors = torch.cat([bank.up, bank.down.transpose(1, 2)], dim=2).double()
    counts = [0] * 50
    for i in range(8):
        best_elsewhere = [-1.0] * 24
        for j in range(8):
            total = 0.0
            for n in range(24):
                mine = vectors[i, n]
                best = max(float(mine @ other / mine.norm() / other.norm()) for other in vectors[j])
                total += best / 24
                if j != i:
                    best_elsewhere[n] = max(best_elsewhere[n], best)
            assert found["similarity"]["0"][i][j] == pytest.approx(total, abs=1e-6)
        for best in best_elsewhere:
            counts[int((best + 1) / 2 * 50)] += 1
    assert found["cosines"]["counts"]["0"] == counts


def test_of_large_experts_some_neurons_are_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: Any = find_blocks(tiny_model("mixtral", num_hidden_layers=1), [Universal()])
    whole = torch.tensor(facts.similarity(blocks)["similarity"]["0"])
    monkeypatch.setattr(facts, "NEURONS", 16)
    found = facts.similarity(blocks)
    assert sum(found["cosines"]["counts"]["0"]) == 8 * 16
    part = torch.tensor(found["similarity"]["0"])
    assert not torch.equal(part, whole) and (part - whole).abs().max() < 0.1
    assert part.diagonal().tolist() == pytest.approx([1.0] * 8)
