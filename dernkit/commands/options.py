"""Options that several commands have, and where they get their components."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from dernkit.registry import Registry

SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a recipe value, e.g. plan.keep=0.75."
)
MODEL = click.option(
    "--model", required=True, metavar="DIR|ID", help="Checkpoint directory, or an id on the Hugging Face hub."
)
TRUST = click.option(
    "--trust-remote-code", is_flag=True, help="Let Python code that comes with the model run. Off by default."
)
DEVICE = click.option(
    "--device",
    "device_name",
    default="cpu",
    show_default=True,
    metavar="NAME",
    help="Where models run and layers are compressed: cpu, cuda, cuda:1, ...; auto: a CUDA GPU where there is one.",
)
RECIPE = click.argument("recipe", type=click.Path(path_type=Path))


def registry() -> Registry:
    """Everything that is installed."""
    from dernkit.registry import Registry

    return Registry.load()
