"""The laws of the method on a whole checkpoint, through the command line."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from dernkit_deepseek_moe.modeling import DeepseekForCausalLM
from dernkit_deepseek_moe.testing import save_tiny
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import dernkit
from dernkit.cli import main
from dernkit.registry import Registry
from dernkit.stages.plan import load_plan

IDS = torch.randint(3, 90, (2, 20), generator=torch.Generator().manual_seed(5))


def run(recipe: str, *overrides: str) -> Path:
    """``dernkit run`` on the source; returns the result's folder."""
    settings = [word for override in overrides for word in ("--set", override)]
    result = CliRunner().invoke(main, ["run", recipe, "--model", "source", "--out", "out", *settings])
    assert result.exit_code == 0, result.output
    return Path("out/model")


def load(folder: Path | str) -> Any:
    """The model as any user of transformers would load it, without a missing or unexpected key."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    assert type(model) is DeepseekForCausalLM
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """[2, 20, V] of the same token ids."""
    return model.eval()(IDS).logits


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors on disk."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def test_names_on_disk_are_the_published_ones(work: Path) -> None:
    networks = [f"experts.{expert}" for expert in range(8)] + ["shared_experts"]
    expected = {f"model.layers.2.mlp.{net}.{part}_proj.weight" for net in networks for part in ("gate", "up", "down")}
    stored = tensors(work / "source")
    names = {name for name in stored if name.startswith("model.layers.2.mlp.")}
    assert names == expected | {"model.layers.2.mlp.gate.weight"}
    assert stored["model.layers.2.mlp.shared_experts.up_proj.weight"].shape == (48, 32)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_keeping_every_expert_changes_no_byte(work: Path, shard: str) -> None:
    save_tiny(work / "source", shard=shard)
    if shard == "20KB":
        (work / "source/model.safetensors").unlink()
    out = run("recipe.yaml", "plan.keep=1.0")
    made = {"README.md", "dernkit.json"}
    before = {file.name: file.read_bytes() for file in (work / "source").iterdir()}
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.name not in made} == before


def test_pruning_is_masking_the_dropped_logits(work: Path) -> None:
    out = run("prune.yaml")
    original = load("source")
    for plan in load_plan(Path("out")):

        def mask(router: Any, args: Any, output: Any, dropped: list[int] = plan.dropped) -> Any:
            masked = output[0].clone()
            masked[:, dropped] = -torch.inf
            return (masked, *masked.softmax(dim=-1).topk(3))

        original.model.layers[plan.layer].mlp.gate.register_forward_hook(mask)
    torch.testing.assert_close(logits(load(out)), logits(original), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_disk_to_disk_and_in_memory_give_the_same_bits(work: Path, dtype: str) -> None:
    save_tiny(work / "source", torch_dtype=dtype)
    out = run("recipe.yaml")
    bound = dernkit.load_recipe(Path("recipe.yaml"), Registry.load())
    tokenizer, rng = AutoTokenizer.from_pretrained("source"), torch.Generator().manual_seed(bound.seed)
    tokens = bound.calibrate.source.tokens(tokenizer, 8, 32, rng)
    live = load("source")
    plans = dernkit.compress(live, bound, tokens.split(2))
    assert [plan.kept.tolist() for plan in plans] == [plan.kept.tolist() for plan in load_plan(Path("out"))]
    assert all(len(plan.assignment) for plan in plans)
    result = load(out)
    for (name, mine), theirs in zip(live.state_dict().items(), result.state_dict().values(), strict=True):
        assert torch.equal(mine, theirs), name
    assert torch.equal(logits(live), logits(result))


def test_the_result_is_a_checkpoint_of_the_same_form(work: Path, config: dict) -> None:
    out = run("recipe.yaml")
    text = (work / "source/config.json").read_text()
    assert (out / "config.json").read_text() == text.replace('"n_routed_experts": 8', '"n_routed_experts": 4')
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        assert (out / name).read_bytes() == (work / "source" / name).read_bytes()
    before, after = tensors(work / "source"), tensors(out)
    untouched = [name for name in before if ".experts." not in name and not name.endswith("mlp.gate.weight")]
    assert all(torch.equal(before[name], after[name]) for name in untouched)
    gone = {name for name in before if any(f".experts.{expert}." in name for expert in range(4, 8))}
    assert before.keys() - after.keys() == gone and after.keys() <= before.keys()
    evaluation = json.loads(Path("out/eval.json").read_text())
    assert all(evaluation[when]["0:perplexity"] for when in ("before", "after"))


def test_the_run_and_the_list_of_plugins_name_the_architecture(work: Path) -> None:
    run("prune.yaml")
    assert "kind: architecture, name: deepseek" in " ".join(Path("out/recipe.lock.yaml").read_text().split())
    listed = json.loads(CliRunner().invoke(main, ["plugins", "--json"]).stdout)["components"]
    row = next(row for row in listed if row["kind"] == "architecture")
    assert (row["name"], row["distribution"]) == ("deepseek", "dernkit-deepseek-moe")


def test_the_checkpoints_own_code_is_not_run_even_where_it_may(work: Path) -> None:
    done = CliRunner().invoke(main, ["inspect", "source", "--trust-remote-code"])
    assert done.exit_code == 0 and "8 per layer, top-3" in done.stdout


def test_generation_works(work: Path) -> None:
    model = load("source").eval()
    written = model.generate(IDS[:1], max_new_tokens=5, do_sample=False, eos_token_id=None, pad_token_id=0)
    with torch.no_grad():
        again = model(written[:, :-1]).logits[:, IDS.shape[1] - 1 :].argmax(dim=-1)
    assert torch.equal(written[:, IDS.shape[1] :], again)
