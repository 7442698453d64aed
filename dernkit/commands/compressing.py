"""Commands that carry a recipe out, or check it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from dernkit.commands import options
from dernkit.errors import CheckpointError, RecipeError


@click.command()
@options.RECIPE
@options.MODEL
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory; the result is OUT/model.")
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The stats.safetensors of another run with this model, used instead of calibrating.",
)
@options.DEVICE
@options.SET
@options.TRUST
def run(
    recipe: Path,
    model: str,
    out: Path,
    statistics: Path | None,
    device_name: str,
    overrides: tuple[str, ...],
    trust_remote_code: bool,
) -> None:
    """Calibrate, plan, apply, evaluate and report, as RECIPE says.

    A stage whose inputs have not changed is skipped; a killed run goes on where it was.
    """
    registry = options.registry()
    from dernkit.models.device import device_of
    from dernkit.models.hub import resolve
    from dernkit.progress import for_terminal
    from dernkit.recipe import load_recipe
    from dernkit.run import Run

    bound, device = load_recipe(recipe, registry, overrides), device_of(device_name)
    work = Run(bound, model, resolve(model), out, registry, for_terminal(), trust_remote_code, statistics, device)
    click.echo(f"report: {work.execute()}")
    click.echo(f"model:  {out / 'model'}")


@click.command()
@options.RECIPE
@options.SET
def validate(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and print it with every default written out."""
    registry = options.registry()
    import yaml

    from dernkit.recipe import load_recipe

    bound = load_recipe(recipe, registry, overrides)
    click.echo(yaml.safe_dump(bound.resolved(), sort_keys=False, width=100, default_flow_style=None).rstrip())
    click.echo(f"# valid; collects {', '.join(sorted(bound.requires)) or 'no statistics'}")


@click.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    registry = options.registry()
    from dernkit.schema import recipe_schema

    click.echo(json.dumps(recipe_schema(registry), indent=1))


@click.command("eval")
@options.RECIPE
@options.MODEL
@options.DEVICE
@options.SET
@options.TRUST
def evaluate(recipe: Path, model: str, device_name: str, overrides: tuple[str, ...], trust_remote_code: bool) -> None:
    """Run RECIPE's evaluators on a model and print their metrics as JSON."""
    registry = options.registry()
    from dernkit.models.architecture import use_architecture
    from dernkit.models.device import device_of
    from dernkit.models.hub import resolve
    from dernkit.progress import for_terminal
    from dernkit.recipe import load_recipe
    from dernkit.stages.evaluate import evaluate as measure

    bound = load_recipe(recipe, registry, overrides)
    if not bound.evaluators:
        raise RecipeError(f"{recipe}: evaluate: must list at least one evaluator. Got none instead.")
    path = resolve(model)
    use_architecture(path, registry.components("architecture"))
    adapters = [component.cls() for component in registry.components("adapter")]
    how: dict[str, Any] = {"adapters": adapters, "trust_remote_code": trust_remote_code}
    how["device"] = device_of(device_name)
    with registry.naming_plugins():
        results = measure(path, bound.evaluators, for_terminal(), what="model", **how)
    click.echo(json.dumps(results, indent=1))


@click.command()
@click.argument("run_directory", metavar="RUN", type=click.Path(path_type=Path))
def report(run_directory: Path) -> None:
    """Print the report of a finished run."""
    files = sorted(run_directory.glob("report.*"))
    if not files:
        raise CheckpointError(
            f"{run_directory}: must be the directory of a finished run. Got no report instead. "
            f"Finish it with: dernkit run RECIPE --model MODEL --out {run_directory}"
        )
    click.echo(files[0].read_text(encoding="utf-8"))
