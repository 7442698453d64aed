"""Rows of a comparison whose differences are known: what a report and an analysis must find again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from dernkit.compare.rows import ORIGINAL, LayerFacts, Row, write_rows
from dernkit.observations import Observations

METRIC = "perplexity/bits_per_byte"
DOMAINS = ("austen", "bible", "postgresql", "python", "speeches")
STRENGTHS = {"prune-frequency": 1.0, "prune-random": 1.6, "reap": 0.7, "dern": 0.55, "dern-gate": 0.56, "m-smoe": 1.2}
"""Recipe -> damage as a share of that of the baseline, prune-frequency."""
EXPERTS = {"mixtral": 8, "qwen2-moe": 32}
LAYERS, DOCUMENTS = 4, 24


def planted(
    folder: Path,
    *,
    models: Sequence[str] = tuple(EXPERTS),
    strengths: Mapping[str, float] = STRENGTHS,
    keeps: Sequence[float] = (0.75, 0.5),
    seeds: int = 3,
    refused: str = "",
    stability: bool = True,
    higher: bool = False,
) -> Path:
    """A finished comparison in ``folder``.

    Args:
        refused: a recipe that the last model refuses.
        higher: the metric with its sign turned round, so that higher is better.
    """
    rows = []
    for model in models:
        rows.append(_original(model))
        for keep in keeps:
            for recipe, strength in strengths.items():
                for seed in range(seeds):
                    no = recipe == refused and model == models[-1]
                    rows.append(_cell(model, recipe, keep, seed, strength, refused=no))
    if higher:
        rows = [
            replace(row, observations={name: _turned(seen) for name, seen in row.observations.items()}) for row in rows
        ]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(rows, folder / "results.parquet")
    if stability:
        (folder / "stability.json").write_text(json.dumps({"points": _stability(models)}))
    return folder


def _turned(seen: Observations) -> Observations:
    return replace(seen, values=-seen.values, higher_is_better=True)


def _observed(model: str, damage: float, noise: int) -> Mapping[str, Observations]:
    fixed, rng = np.random.default_rng([7, len(model)]), np.random.default_rng([8, noise])
    n = len(DOMAINS) * DOCUMENTS
    weights = fixed.integers(500, 1500, n).astype(np.float64)
    hardness = np.repeat(np.linspace(0.6, 1.4, len(DOMAINS)), DOCUMENTS)
    level = 1.8 + 0.3 * fixed.standard_normal(n)
    level += hardness * damage * (1 + 0.1 * rng.standard_normal(n) + 0.05 * rng.standard_normal())
    groups = tuple(domain for domain in DOMAINS for _ in range(DOCUMENTS))
    names = tuple(f"{domain}:{i}" for domain in DOMAINS for i in range(DOCUMENTS))
    return {METRIC: Observations(names, groups, level * weights, weights)}


def _sizes(model: str, keep: float) -> dict[str, int]:
    experts = int(EXPERTS[model] * keep * 500_000)
    return {"parameters": 2_000_000 + experts, "bytes": 4_000_000 + 2 * experts, "expert_bytes": 2 * experts}


def _made_from(model: str) -> dict[str, object]:
    facts = {"path": f"testbeds/{model}/model", "fingerprint": f"{len(model):064x}", "family": model}
    return {
        "model": facts | {"experts": EXPERTS[model], "top_k": 2},
        "evaluate": [{"use": "perplexity", "path": "heldout", "length": 256}],
        "versions": {"dernkit": "0.1.0", "torch": "2.13.0"},
    }


def _original(model: str) -> Row:
    rng, experts = np.random.default_rng(len(model)), EXPERTS[model]
    alike = {}
    for layer in range(LAYERS):
        matrix = rng.uniform(0.05, 0.4, (experts, experts))
        alike[str(layer)] = np.where(np.eye(experts) > 0, 1.0, matrix).round(4).tolist()
    counts = {
        str(layer): np.histogram(rng.normal(0.35, 0.1, 1024), np.linspace(-1, 1, 41))[0].tolist()
        for layer in range(LAYERS)
    }
    cosines = {"edges": np.linspace(-1, 1, 41).tolist(), "counts": counts}
    details = {"similarity": alike, "cosines": cosines, **_made_from(model)}
    seen = _observed(model, 0.0, 0)
    facts = {"observations": seen, "metrics": {METRIC: seen[METRIC].mean()}, "details": details}
    return Row(f"{model}-original", model, ORIGINAL, 1.0, "", 0, "", moved=0.0, **_sizes(model, 1), **facts)  # type: ignore[arg-type]


def _cell(model: str, recipe: str, keep: float, seed: int, strength: float, *, refused: bool) -> Row:
    key = f"{model}-{recipe}-{keep}-{seed}"
    source = {"use": "text-file", "path": "calibration.txt"}
    calibrate = {"source": source, "sequences": 128, "length": 256}
    plan = {"score": {"use": recipe}, "keep": keep}
    details = {"recipe": {"calibrate": calibrate, "plan": plan, "seed": seed}, **_made_from(model)}
    if refused:
        why = f"{recipe}: must have as many experts as groups. Got {EXPERTS[model]} instead. Lower plan.keep."
        sizes = {"parameters": 0, "bytes": 0, "expert_bytes": 0}
        return Row(key, model, recipe, keep, "mixed", seed, why, moved=0.0, **sizes, details=details)
    seen = _observed(model, strength * (1 - keep), sum(map(ord, key)))
    layers = tuple(_layer(model, recipe, keep, layer, strength) for layer in range(LAYERS))
    moved = 0.0 if recipe.startswith("prune") else 0.3
    facts = {"observations": seen, "metrics": {METRIC: seen[METRIC].mean()}, "details": details, "layers": layers}
    return Row(key, model, recipe, keep, "mixed", seed, "", moved=moved, **_sizes(model, keep), **facts)  # type: ignore[arg-type]


def _layer(model: str, recipe: str, keep: float, layer: int, strength: float) -> LayerFacts:
    experts = EXPERTS[model]
    count = int(experts * keep)
    used = np.random.default_rng([layer, experts]).dirichlet(np.full(experts, 3.0)) * 2
    scores = used * np.random.default_rng([layer, experts, len(recipe)]).uniform(0.8, 1.2, experts)
    kept = tuple(sorted(np.argsort(-scores, kind="stable")[:count].tolist()))
    moved = tuple(0 if recipe.startswith("prune") else 40 + 7 * (i % 5) for i in range(count))
    error = strength * (1 - keep) * (0.05 + 0.1 * layer)
    affinity = tuple(np.linspace(0.1, 0.9, 11).tolist()) if moved[0] else ()
    return LayerFacts(layer, experts, kept, tuple(scores.tolist()), tuple(used.tolist()), moved, affinity, error)


def _stability(models: Sequence[str]) -> list[dict[str, object]]:
    return [
        {
            "model": model,
            "calibration": "mixed",
            "scorer": scorer,
            "seed": seed,
            "layer": layer,
            "tokens": tokens,
            "overlap": min(1.0, 0.6 + 0.1 * step + 0.02 * layer - 0.05 * (scorer == "reap") * (step < 4)),
            "spearman": min(1.0, 0.5 + 0.125 * step),
        }
        for model in models
        for scorer in ("gate-mass", "reap")
        for seed in range(2)
        for layer in range(LAYERS)
        for step, tokens in enumerate((2048, 4096, 8192, 16384, 32768))
    ]
