"""The command line as a process: what it imports, how it is interrupted, what it does on a full disk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dernkit.stages import apply
from tests.unit.workbench import Workbench, dernkit, edit_config, hashes, said

MAIN = "from dernkit.cli import main; main(prog_name='dernkit')"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)


def test_help_imports_neither_torch_nor_transformers() -> None:
    code = "import sys\ntry:\n  " + MAIN + "\nfinally:\n  print(*sorted(sys.modules), file=sys.stderr)"
    result = python(code, "--help")
    assert result.stdout.startswith("Usage: dernkit [OPTIONS] COMMAND [ARGS]...")
    assert not {"torch", "transformers", "numpy", "yaml"} & set(result.stderr.split())


def test_a_disk_that_is_full_in_earnest_gives_one_sentence(tmp_path: Path) -> None:
    """The kernel refuses files over 100 kB, as it refuses files on a full disk."""
    bench = Workbench(tmp_path)
    before = hashes(bench.model)
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)); {MAIN}"
    result = python(limited, "run", str(bench.recipe), "--model", str(bench.model), "--out", str(bench.out))
    assert (result.returncode, result.stdout) == (5, "")
    *progress, sentence = result.stderr.splitlines()
    assert [line.partition(":")[0] for line in progress] == ["calibrate", "plan"]
    assert sentence.startswith(f"{bench.out}/.partial/model: the disk must have room for ")
    assert sentence.endswith("Got 'File too large' instead. Free some space or choose another --out.")
    assert hashes(bench.model) == before
    assert {file.name for file in bench.out.iterdir() if not file.name.startswith(".")} == {
        "plan.json",
        "plan.safetensors",
        "recipe.lock.yaml",
        "run.json",
        "stats.safetensors",
    }


def test_an_interrupted_run_says_so_and_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Workbench(tmp_path)

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(apply, "compress_layer", interrupt)
    result = bench.run()
    assert (result.exit_code, result.stdout) == (130, "")
    assert result.stderr.splitlines()[-1] == "interrupted; the same command goes on where it was"
    assert not (bench.out / "model").exists()
    monkeypatch.undo()
    monkeypatch.setattr("dernkit.run.calibrate.calibrate_checkpoint", interrupt)
    bench.finish()


CODE = """
from transformers import MixtralConfig, MixtralForCausalLM

class OwnConfig(MixtralConfig):
    model_type = "own_moe_of_a_test"

class OwnForCausalLM(MixtralForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def own_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workbench:
    """A model whose class is in a file beside its weights."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    bench = Workbench(tmp_path, fused=True)
    (bench.model / "modeling_own.py").write_text(CODE)
    classes = {"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}
    edit_config(bench.model, model_type="own_moe_of_a_test", architectures=["OwnForCausalLM"], auto_map=classes)
    bench.write(evaluate=[{"use": "perplexity", "path": "calib.txt"}])
    return bench


def test_code_that_comes_with_a_model_does_not_run_unless_allowed(own_code: Workbench) -> None:
    (own_code.model / "modeling_own.py").write_text("raise SystemExit('ran')")
    assert own_code.refusal(5) == (
        f"{own_code.model}: must be of a model type that transformers has. Got 'own_moe_of_a_test', whose code comes "
        "with the model, instead. Install a plugin that has this architecture, or read that code, then let it run "
        "with --trust-remote-code."
    )


def test_code_that_comes_with_a_model_runs_when_allowed_and_travels_with_the_result(own_code: Workbench) -> None:
    arguments = ["--model", str(own_code.model), "--out", str(own_code.out), "--trust-remote-code"]
    result = dernkit("run", str(own_code.recipe), *arguments)
    assert result.exit_code == 0, result.stderr
    assert (own_code.out / "model/modeling_own.py").read_text() == CODE
    assert (own_code.out / "eval.json").exists()


def test_code_that_comes_with_a_model_and_fails_is_named(own_code: Workbench) -> None:
    (own_code.model / "modeling_own.py").write_text(CODE.replace("class OwnFor", "1 / 0\n\nclass OwnFor"))
    sentence = said(dernkit("inspect", str(own_code.model), "--trust-remote-code"), 5)
    assert "division by zero" in sentence
