"""The errors that dernkit raises on purpose: one sentence each, *where: what must hold. Got X instead. Fix.*

The command line prints the sentence without a traceback and exits with the class's ``exit_code``.
"""


class DernkitError(Exception):
    """Base of every error that a user can cause; ``str(error)`` is the whole message."""

    exit_code = 1


class RecipeError(DernkitError):
    """A recipe (or a ``--set`` override) that cannot be bound to components."""

    exit_code = 2


class PluginError(DernkitError):
    """A plugin that cannot be registered: broken entry point, invalid component, name collision."""

    exit_code = 3


class ContractError(DernkitError):
    """A component that broke its contract at run time: wrong shape, NaN, undeclared statistic."""

    exit_code = 4


class CheckpointError(DernkitError):
    """A model or checkpoint that is refused, damaged, or cannot be cut as asked."""

    exit_code = 5
