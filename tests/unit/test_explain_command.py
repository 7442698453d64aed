"""`dernkit inspect --explain`: what it prints, when it fails, and that the adapter it begins holds what was found."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from dernkit.api import Block, ExpertBank
from dernkit.cli import main
from dernkit.models.explain.agreement import unpacked
from dernkit.models.explain.starter import starting_adapter
from dernkit.models.explain.survey import survey
from dernkit.models.universal import Universal
from dernkit.testing.checkpoints import save_tiny
from tests.families import build, make_config, model_class
from tests.unit.workbench import dernkit, said, succeeded


def test_a_declared_model_is_explained_and_the_adapter_agrees(tmp_path: Path):
    save_tiny(tmp_path, "deepseek_v3")
    assert succeeded(dernkit("inspect", str(tmp_path), "--explain")).stdout.splitlines() == [
        "model.layers.1.mlp (DeepseekV3MoE)",
        "  experts        8 (config: n_routed_experts); a token uses up to 2",
        "  width          24 (config: moe_intermediate_size), reading vectors of 32",
        "  gate and up    rows of one matrix: all gate rows, then all up rows",
        "  down           experts.down_proj (experts along dimension 0)",
        "  gate and up    experts.gate_up_proj (experts along dimension 0)",
        "  router         gate.weight",
        "  routing        gate.e_score_correction_bias (takes part in the choice alone)",
        "  The adapter's answers agree with all of this.",
        "",
    ]


class Swapped:
    """The universal adapter, but for gate and up, which it takes for each other."""

    name = "swapped"

    def blocks(self, model: Any) -> list[Block]:
        return [SwappedBlock(block) for block in Universal().blocks(model)]  # type: ignore[misc]


class SwappedBlock:
    def __init__(self, block: Block) -> None:
        self.layer, self.path, self.dims, self.tensors = block.layer, block.path, block.dims, block.tensors
        self.block = block

    def bank(self) -> ExpertBank:
        bank = self.block.bank()
        assert bank.gate is not None
        return dataclasses.replace(bank, gate=bank.up, up=bank.gate)


def test_a_contradiction_is_an_error(tmp_path: Path):
    save_tiny(tmp_path, "mixtral")
    registry = SimpleNamespace(components=lambda kind: [SimpleNamespace(cls=Swapped)] if kind == "adapter" else [])
    with patch("dernkit.commands.options.registry", lambda: registry):
        result = CliRunner().invoke(main, ["inspect", str(tmp_path), "--explain"])
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        f"model.layers.0.mlp: the {role} must be what the block uses as such, in 'experts.gate_up_proj'. "
        f"Got other numbers instead."
        for role in ("gate", "up")
    ]
    assert "agree" not in result.stdout


def test_a_damaged_checkpoint_is_refused_as_ever(tmp_path: Path):
    sentence = said(dernkit("inspect", str(tmp_path), "--explain"), 5)
    assert sentence == f"{tmp_path}: must hold config.json. Got none instead. Give the directory of a checkpoint."


@pytest.mark.parametrize("family", ["llama4_text", "dbrx", "switch_transformers"])
def test_a_starting_adapter_unpacks_and_packs_what_was_found(family: str, monkeypatch: pytest.MonkeyPatch):
    finding = survey(model_class(family), make_config(family), []).findings[0]
    namespace: dict[str, Any] = {"__name__": "starter"}
    monkeypatch.setitem(sys.modules, "starter", ModuleType("starter"))
    exec(compile(starting_adapter(finding, family), "starter.py", "exec"), namespace)
    layout = next(value for name, value in namespace.items() if name.endswith("Layout") and name != "Layout")()
    block = build(family).get_submodule(finding.path)
    owners = [module for module in block.modules() if layout.claims(module)]
    assert len(owners) == 1
    weights = layout.unpack(owners[0])
    for role, tensor in unpacked(block, finding.explanation).items():
        assert torch.equal(getattr(weights, role), tensor)
    packed: dict[str, Tensor] = layout.pack(owners[0], weights)
    assert len(packed) == sum(len(weight.names) for weight in finding.explanation.weights)
    for name, tensor in packed.items():
        assert torch.equal(owners[0].get_parameter(name), tensor)
