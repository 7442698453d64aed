"""Commands that look at models and plugins."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from dernkit import listing
from dernkit.commands import options


@click.command()
@click.argument("model", metavar="DIR|ID")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--explain",
    is_flag=True,
    help="Find experts, router and layout without looking at names, by running blocks on random weights; print a "
    "starting adapter for a model that no adapter claims. Exit code 2 if an adapter says otherwise.",
)
@options.TRUST
def inspect(model: str, as_json: bool, explain: bool, trust_remote_code: bool) -> None:
    """Say what a checkpoint is and how far it can be cut, without loading its weights."""
    if as_json and explain:
        raise click.UsageError("--json and --explain: one of them. Got both.")
    registry = options.registry()
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


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plugins(as_json: bool) -> None:
    """List every component that a recipe can name, and where it comes from."""
    registry = options.registry()
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


@click.command()
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
