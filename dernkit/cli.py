"""The command line: the commands of `dernkit.commands`, and what becomes of errors."""

from __future__ import annotations

import sys
from typing import Any

import click

from dernkit.commands import comparing, compressing, looking
from dernkit.errors import CheckpointError, DernkitError

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
        except RuntimeError as error:
            if type(error).__name__ != "OutOfMemoryError":  # torch's, whose import would take a second
                raise
            click.echo(
                "--device: the memory there must hold a decoder layer and what is made of it, or to evaluate the whole "
                "model. Got too little instead. Use another device, --device cpu, or a smaller calibrate.batch_size "
                "or calibrate.sample.",
                err=True,
            )
            sys.exit(CheckpointError.exit_code)
        except KeyboardInterrupt:
            goes_on = "; the same command goes on where it was" if ctx.invoked_subcommand in _GO_ON else ""
            click.echo(f"interrupted{goes_on}", err=True)
            sys.exit(130)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="dernkit")
def main() -> None:
    """Make a Mixture-of-Experts checkpoint smaller in one shot: drop experts, recombine neurons."""


for _command in (
    *(compressing.run, looking.inspect, looking.plugins, looking.check),
    *(compressing.validate, compressing.schema, compressing.evaluate, compressing.report),
    *(comparing.compare, comparing.profile, comparing.tasks),
):
    main.add_command(_command)
