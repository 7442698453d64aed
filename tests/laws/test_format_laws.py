"""A result is in the format of the hub: what other software takes for granted, for every family."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest
from safetensors import safe_open

from dernkit.registry import Registry
from dernkit.testing.checkpoints import FAMILIES, save_tiny, tokens
from tests.laws.pipeline import DERN, recipe, run

EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(.*)")
every_family = pytest.mark.parametrize("family", FAMILIES)


def names_by_shard(folder: Path) -> dict[str, dict[str, int]]:
    """Shard -> the names that it holds and their bytes, as the safetensors library reads them."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as shard:
            found[file.name] = {name: shard.get_tensor(name).nbytes for name in shard.keys()}  # noqa: SIM118 (not a dict)
    return found


@every_family
def test_experts_are_numbered_without_gaps(tmp_path: Path, registry: Registry, family: str) -> None:
    folder, out = tmp_path / "source", tmp_path / "out"
    save_tiny(folder, family)
    plans = run(folder, out, recipe(registry, keep=4, assign={**DERN, "quantile": 0.5}), tokens(4, 16))
    numbers = defaultdict(list)
    for names in names_by_shard(out).values():
        for match in filter(None, map(EXPERT.fullmatch, names)):
            numbers[match[1], match[3]].append(int(match[2]))
    assert len(numbers) == 3 * len(plans)
    assert all(sorted(found) == list(range(4)) for found in numbers.values())
    assert any(plan.kept.tolist() != list(range(4)) for plan in plans)


@every_family
def test_the_index_is_that_of_the_shards(tmp_path: Path, registry: Registry, family: str) -> None:
    folder, out = tmp_path / "source", tmp_path / "out"
    save_tiny(folder, family, shard="40KB")
    run(folder, out, recipe(registry), tokens(4, 16))
    shards = names_by_shard(out)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {name: shard for shard, names in shards.items() for name in names}
    assert index["metadata"]["total_size"] == sum(sum(names.values()) for names in shards.values())
    assert len(shards) > 2


@every_family
def test_fields_that_transformers_does_not_know_stay(tmp_path: Path, registry: Registry, family: str) -> None:
    folder, out = tmp_path / "source", tmp_path / "out"
    save_tiny(folder, family)
    config = json.loads((folder / "config.json").read_text())
    count = next(name for name in ("n_routed_experts", "num_experts", "num_local_experts") if name in config)
    both = ("num_experts", "num_local_experts") if family == "qwen3_moe" else (count,)
    code = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    foreign = {"auto_map": code, "ep_size": 8, "torch_dtype": "float32", "rope_theta": 50000.0, "seq_aux": True}
    config |= {**foreign, **dict.fromkeys(both, 8)}
    (folder / "config.json").write_text(json.dumps(config, indent=4, ensure_ascii=False))
    run(folder, out, recipe(registry), tokens(4, 16))
    assert json.loads((out / "config.json").read_text()) == {**config, **dict.fromkeys(both, 4)}
