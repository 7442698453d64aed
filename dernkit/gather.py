"""All facts about a finished run in one mapping: what reports render."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml

from dernkit.artifacts import read_json
from dernkit.models.export import Export
from dernkit.models.folder import RECORD
from dernkit.models.source import SourceModel, open_source
from dernkit.stages.results import expert_bytes

if TYPE_CHECKING:
    from dernkit.recipe import Recipe


def gather(out: Path, source: SourceModel, model: str, recipe: Recipe) -> dict[str, Any]:
    """Read the artifacts of the run directory ``out`` made from ``source``, which the user called ``model``."""
    plan = json.loads((out / "plan.json").read_text(encoding="utf-8"))
    before = describe(source)
    after = describe(open_source(out / "model", source.adapters, trust_remote_code=source.trust_remote_code))
    evaluation = out / "eval.json"
    calibrated = recipe.calibrate if recipe.requires else None
    lock = yaml.safe_load((out / "recipe.lock.yaml").read_text(encoding="utf-8"))
    return {
        "name": out.resolve().name,
        "model": model,
        "recipe": recipe.resolved(),
        "lock": lock,
        "plan": plan,
        "evaluation": json.loads(evaluation.read_text(encoding="utf-8")) if recipe.evaluators else None,
        "calibration": {
            "tokens": _tokens(out / "stats.safetensors"),
            "statistics": lock.get("statistics"),
            "sequential": calibrated.sequential,
        }
        if calibrated
        else None,
        "fits": read_json(out / "model" / RECORD).get("fits", {}),
        "stages": read_json(out / "run.json").get("stages", {}),
        "source": before,
        "result": after,
        "export": _export(plan, after),
    }


def _export(plan: Mapping[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
    """How many experts each layer keeps, and what that means for who can load the result."""
    counts = tuple(len(layer["kept"]) for layer in plan["layers"].values())
    written = result["experts_by_layer"]
    kind = "padded" if list(counts) != written else "even" if len(set(counts)) == 1 else "dernkit"
    export, extra = Export(kind, counts), len(result["mtp_layers"])
    real, places = (sum(sizes) + extra * sizes[-1] for sizes in (counts, written))
    padding = result["expert_bytes"] * (places - real) // places
    cost = f", {padding:,} bytes of zeros" if padding else ""
    return {
        "kind": kind,
        "experts_by_layer": list(counts),
        "padding_bytes": padding,
        "sentence": export.sentence(cost),
    }


def describe(source: SourceModel) -> dict[str, Any]:
    """Sizes and routing of a checkpoint, from headers and config alone."""
    store, blocks = source.outline
    dims = blocks[0].dims
    tensors = source.checkpoint.tensors
    entries = tensors.values()
    mtp = [(place, [block]) for place, block in source.mtp_outline]
    return {
        "family": source.config.model_type,
        "moe_layers": len(blocks),
        "layers": [block.layer for block in blocks],
        "experts": max(block.dims.experts for block in blocks),
        "experts_by_layer": [block.dims.experts for block in blocks],
        "top_k": dims.top_k,
        "width": dims.width,
        "hidden": dims.hidden,
        "router": "; ".join(dict.fromkeys(block.router_kind() for block in blocks)),
        "groups": dims.groups,
        "top_k_groups": dims.top_k_groups,
        "smallest_keep": max(block.dims.smallest_keep for block in blocks),
        "quantisation": str(source.scheme) if source.scheme else None,
        "parameters": sum(torch.Size(entry.shape).numel() for entry in entries),
        "bytes": source.checkpoint.tensor_bytes,
        "expert_bytes": sum(expert_bytes(*place) for place in [(store, blocks), *mtp]),
        "mtp_layers": [layer.path for layer in source.mtp.layers],
        "mtp_bytes": sum(tensors[key].end - tensors[key].start for key in source.mtp.tensors),
        "dtypes": sorted({entry.dtype for entry in source.checkpoint.on_disk.values()}),
        "shards": len(source.checkpoint.shards),
    }


def abilities(source: SourceModel) -> dict[str, str]:
    """What can be done with a checkpoint, in words; takes one or two more builds on the meta device."""
    if source.counts is not None:
        return {"can": "load with dernkit.load_model, evaluate", "new_width": "none; compress what it was made from"}
    block = source.outline[1][0]
    steps = f" in steps of {block.dims.groups}" if block.dims.groups > 1 else ""
    keep = f"keep {block.dims.smallest_keep} to {block.dims.experts} experts{steps}"
    return {"can": f"{keep}; prune, merge, recombine", "new_width": block.width_kind()}


def _tokens(file: Path) -> int:
    from safetensors import safe_open

    with safe_open(file, "pt") as stored:
        name = next(key for key in stored.keys() if key.endswith(".tokens"))  # noqa: SIM118 (not a dict)
        return int(stored.get_tensor(name))
