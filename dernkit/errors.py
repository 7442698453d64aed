"""The errors that dernkit raises on purpose: one sentence each, *where: what must hold. Got X instead. Fix.*

The command line prints the sentence without a traceback and exits with the class's ``exit_code``.
"""

from __future__ import annotations


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
    """A component that broke its contract at run time: wrong shape, NaN, undeclared statistic.

    Args:
        sentence: the whole message.
        law: id of the law that was broken, one of `dernkit.kernel.contracts.LAWS`; empty where there is none.
        kind: kind of the component, empty while it is not known which one it was.
        component: the recipe's word for it.
        layer: decoder layer, None where there is none.
    """

    exit_code = 4

    def __init__(
        self, sentence: str, *, law: str = "", kind: str = "", component: str = "", layer: int | None = None
    ) -> None:
        super().__init__(sentence)
        self.law, self.kind, self.component, self.layer = law, kind, component, layer

    def by(self, who: str, kind: str, component: str, layer: int | None) -> ContractError:
        """The same with ``who`` in front of the sentence, and whose it is."""
        return ContractError(f"{who}{self}", law=self.law, kind=kind, component=component, layer=layer)


class DeprecatedHookWarning(FutureWarning):
    """A plugin uses a hook, or an argument of one, that will go; it still works. Python shows it by default."""


class CheckpointError(DernkitError):
    """A model or checkpoint that is refused, damaged, or cannot be cut as asked."""

    exit_code = 5
