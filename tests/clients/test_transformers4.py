"""The last transformers 4 reads what dernkit makes with transformers 5, and config.json is the source's text."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoConfig

from dernkit.errors import CheckpointError
from dernkit.testing.checkpoints import tokens
from tests.clients.bench import BUNDLED, SHIPPED, STAGES, Bench, logits5, logits_of, model5
from tests.clients.client import Client
from tests.clients.families4 import EXPERTS, FAMILIES4, WIDTH
from tests.clients.record import RELATIVE, Record

pytestmark = pytest.mark.clients
SUPPORTED = [name for name, family in FAMILIES4.items() if not family.refused]
REFUSED = [name for name, family in FAMILIES4.items() if family.refused]
STAGED = [(name, kind) for name in SUPPORTED for kind in STAGES if kind != "narrower" or FAMILIES4[name].shared]
"""Narrower only where shared experts are counted: there the count must rise."""
IDS = tokens(2, 20, seed=5)


@pytest.fixture
def difference(transformers4: Client, record: Record, tmp_path: Path) -> Callable[[Path, str, str], float]:
    """The largest difference of a logit between the two versions, relative to the largest logit."""

    def measure(folder: Path, model: str, kind: str) -> float:
        found, expected = logits_of(transformers4, folder, IDS, tmp_path / "logits.npy"), logits5(folder, IDS)
        assert expected.std() > 0.5
        measured = float(np.abs(found - expected).max() / np.abs(expected).max())
        record.note(transformers4.version, RELATIVE, model, kind, measured)
        return measured

    return measure


@pytest.mark.parametrize(("family", "kind"), [*((name, "source") for name in SUPPORTED), *STAGED])
def test_both_versions_compute_the_same(
    bench: Bench, difference: Callable[[Path, str, str], float], family: str, kind: str
) -> None:
    folder = bench.published(family) if kind == "source" else bench.staged(family, kind)
    assert difference(folder, family, kind) <= 1e-5


@pytest.mark.parametrize("kind", ["source", *SHIPPED])
def test_both_versions_compute_the_same_with_the_bundled_model(
    bench: Bench, difference: Callable[[Path, str, str], float], kind: str
) -> None:
    assert difference(bench.made(BUNDLED, kind), BUNDLED, kind) <= 1e-5


@pytest.mark.parametrize(("family", "kind"), STAGED)
def test_config_is_the_sources_text_but_for_what_is_counted(bench: Bench, family: str, kind: str) -> None:
    before, after = (
        (folder / "config.json").read_bytes().decode().splitlines(keepends=True)
        for folder in (bench.published(family), bench.staged(family, kind))
    )
    row = FAMILIES4[family]
    counted = {row.count: (EXPERTS, EXPERTS // 2)}
    if width := STAGES[kind].get("width"):
        counted[row.width] = (WIDTH, width)
        if row.shared:
            shared = row.experts[row.shared]
            counted[row.shared] = (shared, math.ceil(shared * WIDTH / width))
    expected = {(f'"{name}": {old},', f'"{name}": {new},') for name, (old, new) in counted.items() if old != new}
    changed = [(old.strip(), new.strip()) for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == len(expected) and set(changed) == expected
    assert f'"rope_theta": {row.rope_theta}' in "".join(after)


def test_the_source_is_in_the_spelling_of_the_hub(bench: Bench) -> None:
    config = json.loads((bench.published("qwen3_moe") / "config.json").read_text())
    assert {"rope_theta", "num_experts", "torch_dtype"} <= config.keys()
    assert not {"rope_parameters", "num_local_experts", "dtype"} & config.keys()


def test_a_config_that_transformers_5_wrote_would_be_noticed(
    transformers4: Client, bench: Bench, tmp_path: Path
) -> None:
    folder = shutil.copytree(bench.staged("olmoe", "pruned"), tmp_path / "rewritten")
    AutoConfig.from_pretrained(folder).save_pretrained(folder)
    found, expected = logits_of(transformers4, folder, IDS, tmp_path / "logits.npy"), logits5(folder, IDS)
    assert np.abs(found - expected).max() > 0.01


@pytest.mark.parametrize("family", REFUSED)
def test_a_family_that_is_left_out_is_refused(bench: Bench, family: str) -> None:
    bench.published(family)
    with pytest.raises(CheckpointError) as caught:
        bench.staged(family, "pruned")
    assert FAMILIES4[family].refused in str(caught.value)


def test_transformers_5_itself_cannot_load_longcat_flash_as_4_wrote_it(bench: Bench) -> None:
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        model5(bench.published("longcat_flash"))
