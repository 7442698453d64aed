"""What carving SmolLM2 into experts costs on the tasks of the DERN paper: dense, carved, and a random model.

    python benchmarks/smol_tasks.py --dense DIR --smol DIR --tasks DIR [--limit 40]

DIRs: of `python -m benchmarks.testbeds.smol.dense`, of `python -m benchmarks.testbeds.smol`, and of
`dernkit tasks prepare`. Runs lm-eval's tasks without examples in the prompt, and writes
benchmarks/results/smol-tasks/results.parquet (the carved model is the original) and README.md beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dernkit.api import Observations, Subject
from dernkit.builtin.lm_eval import LmEval
from dernkit.compare.rows import ORIGINAL, Row, write_rows
from dernkit.compare.statistics import Interval, estimate, panel
from dernkit.digest import digest

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "benchmarks" / "results" / "smol-tasks"
CHANCE = {
    "arc_challenge": 0.25,
    "arc_easy": 0.25,
    "boolq": 0.5,
    "copa": 0.5,
    "hellaswag": 0.25,
    "openbookqa": 0.25,
    "piqa": 0.5,
    "rte": 0.5,
    "sciq": 0.25,
    "winogrande": 0.5,
}
MEAN = "mean of the tasks"
MODELS = ("dense", ORIGINAL, "random")


def models(dense: Path, smol: Path) -> Iterator[tuple[str, Any]]:
    """One after the other, so that one is in memory; the random one has the carved one's config."""
    yield "dense", AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32)
    yield ORIGINAL, AutoModelForCausalLM.from_pretrained(smol, dtype=torch.float32)
    torch.manual_seed(0)
    yield "random", AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(smol), dtype=torch.float32)


def row(recipe: str, model: Any, seen: dict[str, Observations], details: dict[str, Any]) -> Row:
    """Results in the form of a comparison."""
    size = sum(parameter.numel() for parameter in model.parameters())
    return Row(
        key=digest(recipe, details),
        model="smol",
        recipe=recipe,
        keep=1.0,
        calibration="",
        seed=0,
        refused="",
        parameters=size,
        bytes=2 * size,
        expert_bytes=0,
        moved=0.0,
        observations=seen,
        metrics={name: found.mean() for name, found in seen.items()},
        details=details,
    )


def by_task(seen: Observations) -> dict[str, Observations]:
    """Each task's documents."""
    found = {}
    for task in dict.fromkeys(seen.groups):
        chosen = [place for place, group in enumerate(seen.groups) if group == task]
        found[task] = Observations(
            tuple(seen.documents[place] for place in chosen),
            (task,) * len(chosen),
            seen.values[chosen],
            seen.weights[chosen],
            seen.higher_is_better,
        )
    return found


def table(rows: dict[str, Row]) -> str:
    """Accuracy of each model by task, and the carved one's difference from the dense one with its interval."""
    seen = {name: found.observations["lm-eval/acc"] for name, found in rows.items()}
    tasks = {name: {**by_task(each), MEAN: each} for name, each in seen.items()}
    lines = ["| task | documents | dense | carved | carved − dense (95%) | random | chance |", "|---|" + "---:|" * 6]
    for task in tasks["dense"]:
        found = [tasks[name][task] for name in MODELS]
        measured = panel(found, where=task)
        values = [estimate(measured, [(1.0, {None: place})]).interval for place in range(3)]
        loss = estimate(measured, [(1.0, {None: 1}), (-1.0, {None: 0})]).interval
        chance = CHANCE.get(task.removesuffix("_local"), sum(CHANCE.values()) / len(CHANCE))
        cells = [f"{len(found[0].documents):,}", said(values[0]), said(values[1])]
        cells += [f"{loss.estimate:+.3f} ({loss.low:+.3f} to {loss.high:+.3f})", said(values[2]), f"{chance:.2f}"]
        lines.append("| " + " | ".join([task.removesuffix("_local"), *cells]) + " |")
    return "\n".join(lines)


def said(found: Interval) -> str:
    """Value ± half of the interval."""
    return f"{found.estimate:.3f} ± {(found.high - found.low) / 2:.3f}"


def main() -> None:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--dense", type=Path, required=True)
    add("--smol", type=Path, required=True)
    add("--tasks", type=Path, required=True)
    add("--limit", type=int, default=40, help="documents of a task")
    add("--batch-size", type=int, default=8)
    args = parser.parse_args()
    names = tuple(f"{task}_local" for task in CHANCE)
    evaluator = LmEval(
        names, include_path=args.tasks.resolve(), limit=args.limit, num_fewshot=0, batch_size=args.batch_size
    )
    tokenizer = AutoTokenizer.from_pretrained(args.smol)
    rows = {}
    for name, model in models(args.dense, args.smol):
        seen = evaluator.observe(Subject(model.eval(), tokenizer, args.smol))
        found = {f"lm-eval/{metric}": each for metric, each in seen.items()}
        rows[name] = row(name, model, found, {"tasks": list(names), "limit": args.limit, "fewshot": 0})
    OUT.mkdir(parents=True, exist_ok=True)
    write_rows([rows[ORIGINAL], rows["dense"], rows["random"]], OUT / "results.parquet")
    text = table(rows)
    intro = (
        "`python benchmarks/smol_tasks.py`: accuracy on the first documents of each task, zero-shot, "
        "with the half-width of 95% intervals over documents. Carved: `benchmarks/testbeds/smol`. "
        "Random: a model of the carved one's config that has learned nothing."
    )
    (OUT / "README.md").write_text(f"# SmolLM2 before and after carving\n\n{intro}\n\n{text}\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
