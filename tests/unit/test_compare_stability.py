"""Scores as calibration tokens grow."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from dernkit.builtin.scorers import GateMass
from dernkit.compare.stability import _spearman
from dernkit.models.loading import load_checked
from dernkit.models.stack import find_blocks
from dernkit.models.universal import Universal
from dernkit.progress import Silent
from dernkit.registry import Registry
from dernkit.stages.calibrate import batched, calibrate_live
from dernkit.stages.evaluate import load_tokenizer
from tests.unit.comparing import Comparing


@pytest.fixture
def comparing(tmp_path: Path) -> Comparing:
    made = Comparing(tmp_path)
    del made.data["models"]["qwen"]
    return made


def test_points_are_those_of_calibrations_on_the_first_tokens(comparing: Comparing, registry: Registry) -> None:
    comparing.write(stability={"scorers": ["gate-mass", "reap"], "shares": [0.25, 0.5, 1.0]}, seeds=[1])
    comparing.compare(registry)
    points = json.loads((comparing.out / "stability.json").read_text())["points"]
    assert [(p["scorer"], p["layer"], p["tokens"]) for p in points] == [
        (scorer, layer, tokens) for scorer in ("gate-mass", "reap") for layer in (0, 1) for tokens in (16, 32, 64)
    ]
    assert all(p["overlap"] == p["spearman"] == 1 for p in points if p["tokens"] == 64)
    scores = [_scores(comparing, registry, sequences) for sequences in (1, 2, 4)]
    for layer in (0, 1):
        whole = scores[-1][layer]
        for found, sequences in zip(scores, (1, 2, 4), strict=True):
            point = next(p for p in points if (p["layer"], p["tokens"]) == (layer, 16 * sequences))
            best = [set(np.argsort(-each, kind="stable")[:4]) for each in (found[layer], whole)]
            assert point["overlap"] == len(best[0] & best[1]) / 4
            assert point["spearman"] == pytest.approx(spearmanr(found[layer], whole).statistic)
    assert any(p["spearman"] < 1 for p in points)


def _scores(comparing: Comparing, registry: Registry, sequences: int) -> dict[int, np.ndarray]:
    """Gate mass by layer, from the first sequences alone."""
    spec, path = comparing.bench(registry).calibration["mixed"], comparing.root / "mixtral"
    rng = torch.Generator().manual_seed(1)
    tokens = spec.source.tokens(load_tokenizer(path), spec.sequences, spec.length, rng)[:sequences]
    model = load_checked(path, [Universal()])
    blocks = find_blocks(model, [Universal()])
    options = {"sample_size": 8, "seed": 1, "progress": Silent()}
    stats = calibrate_live(model, blocks, batched(tokens, 8), frozenset({"gate_sum"}), **options)  # type: ignore[arg-type]
    return {block.layer: GateMass().score(block.bank(), stats[block.layer]).numpy() for block in blocks}


@pytest.mark.parametrize(("one", "other", "value"), [([1, 1, 1], [2, 2, 2], 1), ([1, 1, 1], [1, 2, 3], 0)])
def test_equal_scores_have_a_rank_correlation(one: list[float], other: list[float], value: float) -> None:
    assert _spearman(torch.tensor(one), torch.tensor(other)) == value
