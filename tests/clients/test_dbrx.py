"""DBRX keeps ``rope_theta`` where transformers 5 does not look: refused where that matters, until it is at the top."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from dernkit.errors import CheckpointError
from dernkit.registry import Registry
from dernkit.testing.checkpoints import tokens
from tests.clients.bench import STAGES, Bench, logits5, logits_of
from tests.clients.client import Client
from tests.clients.families4 import DBRX_THETA, ROPE_THETA
from tests.clients.record import RELATIVE, Record
from tests.laws.pipeline import recipe, run

pytestmark = pytest.mark.clients
IDS = tokens(2, 20, seed=5)


def trained_with(theta: float, bench: Bench, folder: Path, *, at_the_top: bool) -> Path:
    """DBRX as transformers 4 would have written it for another ``rope_theta``; perhaps with that at the top, too."""
    shutil.copytree(bench.published("dbrx"), folder)
    config = json.loads((folder / "config.json").read_text())
    config["attn_config"]["rope_theta"] = theta
    top = {"rope_theta": theta} if at_the_top else {}
    (folder / "config.json").write_text(json.dumps({**config, **top}, indent=2) + "\n")
    return folder


def compressed(folder: Path, kind: str) -> Path:
    """What the stages make of it."""
    out = folder.with_name(f"{folder.name}-{kind}")
    run(folder, out, recipe(Registry.load(entry_points=False), **STAGES[kind]), tokens(4, 16))
    return out


def test_another_rope_theta_in_dbrxs_own_place_alone_is_refused(
    transformers4: Client, bench: Bench, tmp_path: Path
) -> None:
    folder = trained_with(ROPE_THETA, bench, tmp_path / "dbrx", at_the_top=False)
    with pytest.raises(CheckpointError) as caught:
        compressed(folder, "pruned")
    for words in (f"with a rope_theta of {ROPE_THETA}. Got {DBRX_THETA} from", f'Write "rope_theta": {ROPE_THETA} at'):
        assert words in str(caught.value)
    theirs = logits_of(transformers4, folder, IDS, tmp_path / "logits.npy")
    assert np.abs(theirs - logits5(folder, IDS)).max() > 0.01  # transformers 5 computes something else without a word


@pytest.mark.parametrize("kind", ["source", *(kind for kind in STAGES if kind != "narrower")])
def test_written_at_the_top_too_both_versions_compute_the_same(
    transformers4: Client, bench: Bench, record: Record, tmp_path: Path, kind: str
) -> None:
    folder = trained_with(ROPE_THETA, bench, tmp_path / "dbrx", at_the_top=True)
    result = folder if kind == "source" else compressed(folder, kind)
    config = json.loads((result / "config.json").read_text())
    assert config["rope_theta"] == config["attn_config"]["rope_theta"] == ROPE_THETA
    theirs, ours = logits_of(transformers4, result, IDS, tmp_path / "logits.npy"), logits5(result, IDS)
    difference = float(np.abs(theirs - ours).max() / np.abs(ours).max())
    record.note(transformers4.version, RELATIVE, f"dbrx, rope_theta {ROPE_THETA:.0f}", kind, difference)
    assert difference <= 1e-5


def test_transformers_4_does_not_look_at_the_top(transformers4: Client, bench: Bench, tmp_path: Path) -> None:
    folders = [trained_with(ROPE_THETA, bench, tmp_path / str(top), at_the_top=top) for top in (False, True)]
    alone, both = (logits_of(transformers4, folder, IDS, tmp_path / "logits.npy") for folder in folders)
    assert np.array_equal(alone, both)
    assert not np.allclose(alone, logits_of(transformers4, bench.published("dbrx"), IDS, tmp_path / "logits.npy"))
