"""The demo: halve the experts of the bundled model six ways and compare, on held-out text of every domain.

    python benchmarks/demo.py [--out runs/demo] [--write-readme]

Runs `dernkit run` with six recipes on the trained Mixtral in benchmarks/testbeds/mixtral/model, loads each result in
stock transformers, and prints one table: loss per domain, size, parameters.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTBEDS = ROOT / "benchmarks" / "testbeds"
MODEL = TESTBEDS / "mixtral" / "model"
RECIPES = {
    "prune by gate mass": "prune-gate-mass",
    "prune by REAP": "prune-reap",
    "DERN (paper)": "dern",
    "DERN (tuned)": "dern-tuned",
    "narrower experts": "shrink-width",
    "recombine": "recombine",
}
EVALUATION = "use: perplexity, path: benchmarks/testbeds/heldout, length: 256, batch_size: 32, limit: 20000"
TEXT = "benchmarks/testbeds/calibration.txt"
WRITING = ("shrink-width", "recombine")
"""Recipes whose model writes a part of the calibration text."""
PROMPT = "The president of the United States"


def run(recipe: str, out: Path) -> None:
    """One `dernkit run`, typed as a user would."""
    command = [
        *(sys.executable, "-m", "dernkit", "run", f"recipes/{recipe}.yaml"),
        *("--model", str(MODEL.relative_to(ROOT)), "--out", str(out)),
        *("--set", f"calibrate.source.{'text.path' if recipe in WRITING else 'path'}={TEXT}"),
        *("--set", "calibrate.sequences=128"),
        *("--set", "calibrate.length=256"),
        *("--set", f"evaluate=[{{{EVALUATION}}}]"),
    ]
    print("$ dernkit " + " ".join(f"'{word}'" if " " in word else word for word in command[3:]), flush=True)
    done = subprocess.run(command, cwd=ROOT)
    if done.returncode:
        raise SystemExit(done.returncode)


def results(out: Path) -> tuple[dict[str, float], dict[str, float], str]:
    """Metrics before and after, and the share of the dropped segments that moved, of a finished run."""
    evaluation = json.loads((out / "eval.json").read_text(encoding="utf-8"))
    before, after = (evaluation[side]["0:perplexity"] for side in ("before", "after"))
    layers = json.loads((out / "plan.json").read_text(encoding="utf-8"))["layers"].values()
    moved = sum(layer["moved_segments"] for layer in layers)
    discarded = sum(layer["discarded_segments"] for layer in layers)
    gone = moved + discarded
    return before, after, f"{moved / gone:.1%}" if gone else "-"


def sizes(model: Path) -> tuple[float, float]:
    """Megabytes of weights and millions of parameters."""
    from safetensors import safe_open

    file = model / "model.safetensors"
    with safe_open(file, "pt") as tensors:
        shapes = [tensors.get_slice(name).get_shape() for name in tensors.keys()]  # noqa: SIM118 (not a dict)
    count = 0
    for shape in shapes:
        product = 1
        for size in shape:
            product *= size
        count += product
    return file.stat().st_size / 1e6, count / 1e6


def table(out: Path) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one column a model, one row a domain, then mean, size and parameters."""
    columns: dict[str, dict[str, float]] = {}
    models = {"original": MODEL}
    notes = {"original": "-"}
    for label, recipe in RECIPES.items():
        before, after, notes[label] = results(out / recipe)
        columns.setdefault("original", before)
        columns[label] = after
        models[label] = out / recipe / "model"
    losses = [name.removesuffix("/loss") for name in columns["original"] if name.endswith("/loss")]
    domains = [domain for domain in losses if domain != "mean"]
    rows = [[domain, *(f"{column[f'{domain}/loss']:.3f}" for column in columns.values())] for domain in domains]
    rows.append(["mean loss (nats/token)", *(f"{column['mean/loss']:.3f}" for column in columns.values())])
    start = columns["original"]["mean/loss"]
    rows.append(["rise over the original", *(f"{column['mean/loss'] - start:+.3f}" for column in columns.values())])
    size = {label: sizes(path) for label, path in models.items()}
    rows.append(["segments moved", *notes.values()])
    rows.append(["weights (MB)", *(f"{megabytes:.2f}" for megabytes, _ in size.values())])
    rows.append(["parameters (millions)", *(f"{parameters:.2f}" for _, parameters in size.values())])
    return ["held-out text", *columns], rows


def continuation(model: Path) -> str:
    """What the compressed model writes after the prompt, loaded by stock transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    written = loaded.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(written[0], skip_special_tokens=True)


def show(header: list[str], rows: list[list[str]]) -> None:
    """The table on the terminal."""
    from rich.console import Console
    from rich.table import Table

    view = Table(title="8 → 4 experts, four ways: loss on held-out text (nats per token; lower is better)")
    for position, name in enumerate(header):
        view.add_column(name, justify="left" if position == 0 else "right")
    for row in rows:
        view.add_row(*row, end_section=row[0] in ("wordnet-glosses", "rise over the original"))
    Console(width=max(110, Console().width)).print(view)


def write_readme(header: list[str], rows: list[list[str]], seconds: float) -> None:
    """Put the table between the markers of README.md, with machine class and commit."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows]
    lines += ["", f"`make demo`, {seconds:.0f} s on {_cores()} {platform.machine()} cores, commit {commit.strip()}."]
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    block = "<!-- demo:begin -->\n" + "\n".join(lines) + "\n<!-- demo:end -->"
    readme.write_text(re.sub(r"<!-- demo:begin -->.*?<!-- demo:end -->", lambda _: block, text, flags=re.S), "utf-8")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> None:
    """Run, compare, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "demo", help="where the runs go")
    parser.add_argument("--write-readme", action="store_true", help="put the table into README.md")
    arguments = parser.parse_args()
    start = time.monotonic()
    for recipe in RECIPES.values():
        run(recipe, arguments.out / recipe)
    header, rows = table(arguments.out)
    seconds = time.monotonic() - start
    show(header, rows)
    best = arguments.out / RECIPES["recombine"]
    print(f"\nThe recombined half-size model, loaded by stock transformers, goes on: {continuation(best / 'model')!r}")
    print(f"Reports: {arguments.out}/*/report.md    {seconds:.0f} s")
    if arguments.write_readme:
        write_readme(header, rows, seconds)


if __name__ == "__main__":
    main()
