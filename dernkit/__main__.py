"""`python -m dernkit` is the command `dernkit`."""

from dernkit.cli import main

main(prog_name="dernkit")
