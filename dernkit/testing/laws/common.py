"""Laws of all kinds: what a component is, and that a call leaves no trace and depends on nothing but its arguments."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from dernkit.api import hookimpl
from dernkit.binding import Binder
from dernkit.components import KINDS, Origin, component_of, provenance_of
from dernkit.document import Document
from dernkit.errors import ContractError, DernkitError, PluginError
from dernkit.registry import Registry
from dernkit.shapes import plain
from dernkit.testing.law import Broken, Check, kind_of, require
from dernkit.testing.trials import LAYER_KINDS, Trial, call, restricted, trials
from dernkit.testing.watch import first_difference, leaves, random_states, seeded, snapshot


@dataclass(frozen=True, slots=True)
class Nothing:
    """The input of laws that need none."""

    what: str = "its class"


def valid_class(component: Any, given: Nothing) -> None:
    """The class is a frozen dataclass with a name, bounded options and the method that its kind has."""
    try:
        _described(component)
    except PluginError as error:
        raise Broken(str(error)) from None


def options_round_trip(component: Any, given: Nothing) -> None:
    """Written into a recipe and read from it again, a component is equal to what it was."""
    kind = kind_of(component)
    written = json.loads(json.dumps(plain(component)))
    document = Document("the recipe", Path("/"), data={"component": written})
    read = Binder(document, _registry_of(component)).component(("component",), kind)
    document.raise_problems()
    require(
        read == component and hash(read) == hash(component),
        "be equal after it was written into a recipe and read again",
        f"{read!r} of {component!r}",
        "Keep the values of options as they are given; normalise none in __post_init__.",
    )


def copies(component: Any, given: Nothing) -> None:
    """A copy and an unpickled pickle are equal to the component."""
    try:
        made = copy.deepcopy(component), pickle.loads(pickle.dumps(component))
    except Exception as error:
        raise Broken(
            f"must be one that can be copied and pickled. Got {type(error).__name__}: {error} instead. "
            "Define the class at the top of a module, and keep no state in it."
        ) from None
    require(
        made == (component, component),
        "be equal to its copy",
        f"{made[1]!r} for {component!r}",
        "Keep nothing in it but its options.",
    )


def determinism(component: Any, trial: Trial) -> None:
    """The same arguments give the same bits, wherever the global random generators are."""
    kind, results = kind_of(component), []
    for seed in (0, 1):
        with seeded(seed):
            results.append(snapshot(call(kind, component, trial.make())))
    place = first_difference(*results)
    require(
        place is None,
        "return the same bits for the same arguments",
        f"others in {place} at the second call",
        "Draw random numbers from `rng` or from dernkit.kernel.seeding.generator, and keep no state.",
    )


def global_randomness(component: Any, trial: Trial) -> None:
    """The global random generators of torch, numpy and Python are where they were."""
    arguments = trial.make()
    with seeded(0):
        before = random_states()
        call(kind_of(component), component, arguments)
        moved = [name for name, state in random_states().items() if state != before[name]]
    require(
        not moved,
        "leave the global random generators alone",
        f"that of {', '.join(moved)} moved",
        "Draw from `rng` or from dernkit.kernel.seeding.generator.",
    )


def no_mutation(component: Any, trial: Trial) -> None:
    """Arguments have the same bits after the call."""
    arguments = trial.make()
    before = snapshot(arguments)
    call(kind_of(component), component, arguments)
    place = first_difference(before, snapshot(arguments))
    require(place is None, "leave its arguments as they are", f"another value of argument {place}", "Work on a copy.")


def only_declared_statistics(component: Any, trial: Trial) -> None:
    """Given only the statistics that it requires, a component returns what it returns given all."""
    kind = kind_of(component)
    everything = snapshot(call(kind, component, trial.make()))
    try:
        declared = snapshot(call(kind, component, restricted(trial.make(), component.requires)))
    except (ContractError, KeyError, TypeError) as error:
        raise Broken(
            f"must read the statistics that it requires. Got {error} instead. Name it in `requires`."
        ) from None
    place = first_difference(everything, declared)
    require(
        place is None,
        "read no statistics but those that it requires",
        f"another result in {place} without the others",
        "Name in `requires` what it reads.",
    )


def finite(component: Any, trial: Trial) -> None:
    """What it returns is finite, also for experts that saw no token, and for neurons of zeros."""
    for path, leaf in leaves(call(kind_of(component), component, trial.make())):
        if isinstance(leaf, torch.Tensor | float):
            values = torch.as_tensor(leaf)
            wrong = values[~values.isfinite()]
            require(
                not len(wrong.flatten()),
                "return finite numbers",
                lambda path=path, wrong=wrong: f"{wrong.flatten()[0].item()} in {path or 'the result'}",
                "Divide by no count, weight or norm of 0.",
            )


def error_sentences(component: Any, trial: Trial) -> None:
    """What it cannot work on it refuses in a sentence: what must hold, what it got instead."""
    try:
        call(kind_of(component), component, trial.make())
    except DernkitError as error:
        said = " ".join(str(error).split())
        require(
            " must " in f" {said}" and "Got " in said and "instead" in said,
            "refuse by a sentence *where: what must hold. Got X instead. Fix.*",
            f"'{said}'",
            "Write the error in this form.",
        )
        raise


def _described(component: Any) -> Any:
    cls = type(component)
    return component_of(KINDS[kind_of(component)], cls, provenance_of(cls, Origin("the kit", "local", "0")))


def _registry_of(component: Any) -> Registry:
    """A registry of the component and of those that it holds, and of no others."""
    found: dict[str, list[type]] = {}
    for each in _held(component):
        classes = found.setdefault(kind_of(each), [])
        if type(each) not in classes:
            classes.append(type(each))
    registry = Registry()
    hooks = {KINDS[kind].hook: _hook(KINDS[kind].hook, classes) for kind, classes in found.items()}
    registry.register(SimpleNamespace(**hooks), "kit")
    return registry


def _hook(name: str, classes: list[type]) -> Callable[[], list[type]]:
    def provide() -> list[type]:
        return classes

    provide.__name__ = name
    return hookimpl(provide)


def _held(component: Any) -> Iterator[Any]:
    yield component
    for option in dataclasses.fields(component):
        value = getattr(component, option.name)
        if dataclasses.is_dataclass(value):
            yield from _held(value)


def _nothing() -> Sequence[Nothing]:
    return [Nothing()]


def common_laws(kind: str, made: Callable[[], Sequence[Trial]] | None = None) -> list[Check]:
    """The laws that all components of a kind share; ``made``: the calls on which they are checked."""
    checks = [Check(kind, law, _nothing) for law in (valid_class, options_round_trip, copies)]
    if kind in LAYER_KINDS:
        made = partial(trials, kind)
        checks += [Check(kind, only_declared_statistics, made), Check(kind, finite, made)]
    if made is not None:
        laws = (determinism, global_randomness, no_mutation, error_sentences)
        checks += [Check(kind, law, made) for law in laws]
    return checks
