"""What a law is: a sentence with an id that all components of a kind keep, and inputs on which that is checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from pathlib import Path
from typing import Any

from dernkit.components import KINDS
from dernkit.errors import ContractError, DernkitError, PluginError
from dernkit.sentences import reason
from dernkit.shapes import plain


class Broken(Exception):  # noqa: N818  (it is no error of the kit)
    """Raised by a law: *must hold. Got X instead. Fix.*, without saying where."""


def require(holds: bool, must: str, got: object, fix: str) -> None:
    """Raises Broken where a law does not hold. ``got`` is what is there instead, or a function that says it."""
    if not holds:
        raise Broken(f"must {must}. Got {got() if callable(got) else got} instead. {fix}")


Always = Callable[[Any], bool]


@dataclass(frozen=True, slots=True)
class Check:
    """One law of one kind; called with a component, it returns None or raises ContractError.

    A component may refuse an input by a DernkitError in words; at least one of the inputs it must accept.
    """

    kind: str
    law: Callable[[Any, Any], None]
    inputs: Callable[[], Sequence[Any]]
    """Small inputs on which the law is checked, each with a name in ``what``."""
    since: str = "0.1"
    """First version of dernkit whose kit has it."""
    only_if: Always = lambda component: True
    """Whether the law says anything about this component."""

    @property
    def id(self) -> str:
        """The law's name in test ids, in errors and in expected failures."""
        return self.law.__name__

    @property
    def sentence(self) -> str:
        """The law in words."""
        return " ".join((self.law.__doc__ or "").split())

    def __call__(self, component: Any) -> None:
        """Check the law on all inputs.

        Raises:
            ContractError: the component breaks the law; names both, and the input.
        """
        refusals, accepted = [], 0
        names: dict[str, Any] = {"law": self.id, "kind": self.kind, "component": _name(component)}
        for given in self.inputs():
            where = f"{self.kind} '{_name(component)}', law {self.id}, {given.what}"
            try:
                self.law(component, given)
                accepted += 1
            except Broken as broken:
                raise ContractError(f"{where}: {broken}", **names) from None
            except ContractError as error:
                said = f"{where}: must keep its contract. Got '{error}' instead. Fix that first."
                raise ContractError(said, **names) from error
            except DernkitError as error:
                refusals.append(f"{where}: must work on at least one of the kit's inputs. Got '{error}' instead.")
            except Exception as error:
                raise ContractError(
                    f"{where}: must not fail. Got {type(error).__name__}: {reason(error)} instead. "
                    "Handle this input, or refuse it with a CheckpointError or RecipeError that says what must hold.",
                    **names,
                ) from error
        if not accepted:
            raise ContractError(f"{refusals[0]} Accept what calibration and planning make of a usual model.", **names)

    def __repr__(self) -> str:
        return self.id


def kind_of(component: Any) -> str:
    """The kind whose methods a component has.

    Raises:
        PluginError: it is a class, or has the methods of no kind or of several.
    """
    if isinstance(component, type):
        raise PluginError(
            f"{component.__name__}: must be an instance, whose options are known. Got the class instead. "
            f"Write {component.__name__}()."
        )
    cls = type(component)
    found = [kind.name for kind in KINDS.values() if all(callable(getattr(cls, name, None)) for name in kind.methods)]
    if len(found) != 1:
        methods = ", ".join(f"{'/'.join(kind.methods)} ({kind.name})" for kind in KINDS.values())
        raise PluginError(
            f"{cls.__name__}: must have the methods of one kind: {methods}. "
            f"Got those of {' and '.join(found) or 'none'} instead. Write the methods of its protocol in dernkit.api."
        )
    return found[0]


def label(component: Any) -> str:
    """Class name, and the options that are not at their defaults: ``MyScorer(power=2.0)``."""
    shown = [
        f"{field.name}={_shown(getattr(component, field.name))}"
        for field in fields(component)
        if getattr(component, field.name) != _default(field)
    ]
    return type(component).__name__ + (f"({', '.join(shown)})" if shown else "")


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _shown(value: Any) -> str:
    if hasattr(value, "__dataclass_fields__"):
        return label(value)
    return value.name if isinstance(value, Path) else str(plain(value))


def _name(component: Any) -> str:
    return str(getattr(component, "name", type(component).__name__))
