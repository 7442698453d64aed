"""Laws of what reads files, models and runs: sources, evaluators, reports, adapters, architectures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dernkit.components import KINDS
from dernkit.errors import RecipeError
from dernkit.testing.law import Broken, Check, require
from dernkit.testing.laws.common import common_laws
from dernkit.testing.trials import Trial, call, generator

SEQUENCES, LENGTH = 4, 16
TOO_MANY = 10**9


@dataclass(frozen=True, slots=True)
class Made:
    """What one of the kit's factories makes, when it is needed."""

    what: str
    family: str = ""


def shape(source: Any, given: Made) -> None:
    """Tokens are [sequences, length]."""
    found = _tokens(source)
    shaped = isinstance(found, Tensor) and found.shape == (SEQUENCES, LENGTH)
    got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    require(shaped, f"return tokens of shape {[SEQUENCES, LENGTH]}", got, "Cut full sequences, without padding.")


def dtype(source: Any, given: Made) -> None:
    """Tokens are int64."""
    require(_tokens(source).dtype == torch.int64, "return int64 tokens", _tokens(source).dtype, "Cast them.")


def in_range(source: Any, given: Made) -> None:
    """Tokens are ids of the tokenizer's vocabulary."""
    found, size = _tokens(source), len(_tokenizer())
    legal = bool(((found >= 0) & (found < size)).all())
    require(
        legal, f"return ids from 0 to {size - 1}", f"{int(found.min())} to {int(found.max())}", "Use the tokenizer."
    )


def too_short(source: Any, given: Made) -> None:
    """A source that is too short for one sequence of the asked length raises RecipeError."""
    try:
        found = source.tokens(_tokenizer(), 1, TOO_MANY, generator())
    except RecipeError:
        return
    got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
    raise Broken(f"must refuse to make a sequence of {TOO_MANY:,} tokens. Got {got} instead. Raise RecipeError.")


def named_numbers(evaluator: Any, given: Made) -> None:
    """Metrics are finite numbers under stable names that are not empty."""
    found = evaluator.evaluate(_subject())
    named = isinstance(found, Mapping) and len(found) > 0 and all(isinstance(name, str) and name for name in found)
    require(named, "return a mapping of names to numbers", repr(found)[:80], "Name every metric.")
    wrong = [name for name, value in found.items() if isinstance(value, bool) or not _finite(value)]
    require(
        not wrong, "return finite numbers", lambda: f"{found[wrong[0]]!r} for {wrong[0]}", "Leave it out, or fix it."
    )


def text(report: Any, given: Made) -> None:
    """A document is text that is not empty, and names the model and the components of the run."""
    facts = _facts()
    found = report.render(facts)
    require(isinstance(found, str) and bool(found), "return text", repr(found)[:80], "Return a str.")
    missing = [word for word in (facts["model"], "gate-mass") if word not in found]
    require(not missing, "name the model and the components", lambda: f"no '{missing[0]}'", "Write what was done.")


def only_its_own(adapter: Any, given: Made) -> None:
    """Blocks of a model are a list in layer order; it is empty for a model that is not the adapter's."""
    found = adapter.blocks(_model(given.family))
    numbers = [block.layer for block in found] if isinstance(found, list) else None
    require(numbers is not None and numbers == sorted(numbers), "return a list of blocks", numbers, "Sort by layer.")


def blocks_round_trip(adapter: Any, given: Made) -> None:
    """Keeping every expert of a block gives its tensors back, bit for bit, and the experts compute what it computes."""
    from dernkit.builtin.routers import Slice
    from dernkit.kernel.compress import compress_layer
    from dernkit.types import Assignment, LayerPlan

    for block in adapter.blocks(_model(given.family)):
        block.check()
        dims, bank = block.dims, block.bank()
        everyone = torch.arange(dims.experts)
        plan = LayerPlan(
            dims.layer, dims.experts, dims.width, torch.ones(dims.experts).double(), everyone, Assignment.empty()
        )
        before, after = block.tensors(), block.resized(compress_layer(bank, plan, None, Slice(), dims.width, 0))
        changed = [name for name, tensor in after.items() if not torch.equal(tensor, before[name])]
        require(
            not changed, "give back what it read", lambda changed=changed: f"another {changed[0]}", "Fix `resized`."
        )


def model_type(architecture: Any, given: Made) -> None:
    """The config class has the component's name as `model_type`, and a default for every field."""
    from transformers import PreTrainedConfig

    found = architecture.config_class()
    is_config = isinstance(found, type) and issubclass(found, PreTrainedConfig)
    require(is_config, "return a subclass of PreTrainedConfig", repr(found), "Derive it.")
    must = f"return a config whose model_type is '{architecture.name}'"
    require(found.model_type == architecture.name, must, repr(found.model_type), "Name both alike.")
    found()


def model_of_config(architecture: Any, given: Made) -> None:
    """The model class is a PreTrainedModel that is built from a default config alone."""
    from transformers import PreTrainedModel

    found = architecture.model_class()
    is_model = isinstance(found, type) and issubclass(found, PreTrainedModel)
    require(is_model, "return a subclass of PreTrainedModel", repr(found), "Derive it.")
    with torch.device("meta"):
        found(architecture.config_class()())


def listed_conversions(architecture: Any, given: Made) -> None:
    """Conversions are a sequence of transformers' converters and renamings."""
    found = architecture.conversions()
    known = isinstance(found, Sequence) and all(type(each).__name__.startswith("Weight") for each in found)
    require(known, "return a list of WeightConverter and WeightRenaming", repr(found)[:80], "Return a list.")


def _tokens(source: Any) -> Any:
    return call("source", source, (_tokenizer(), SEQUENCES, LENGTH, generator()))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _tokenizer() -> Any:
    from dernkit.testing.checkpoints import tiny_tokenizer

    return tiny_tokenizer()


def _subject() -> Any:
    from dernkit.testing.runs import subject

    return subject()


def _facts() -> Any:
    from dernkit.testing.runs import facts

    return facts()


def _model(family: str) -> Any:
    from dernkit.testing.checkpoints import tiny_model

    return tiny_model(family, num_hidden_layers=2)


def _once(what: str) -> list[Made]:
    return [Made(what)]


def _families() -> list[Made]:
    return [Made(f"a {family} model", family) for family in ("mixtral", "qwen2_moe", "deepseek_v3")]


def _trial(kind: str) -> list[Trial]:
    make = {
        "source": lambda: (_tokenizer(), SEQUENCES, LENGTH, generator()),
        "evaluator": lambda: (_subject(),),
        "report": lambda: (_facts(),),
    }
    return [Trial(f"a {kind}'s call", make[kind])]


_LAWS: Mapping[str, tuple[Any, ...]] = {
    "source": (shape, dtype, in_range, too_short),
    "evaluator": (named_numbers,),
    "report": (text,),
    "adapter": (only_its_own, blocks_round_trip),
    "architecture": (model_type, model_of_config, listed_conversions),
}


def laws() -> list[Check]:
    """Of all these kinds, those that all kinds share included."""
    found = []
    for kind, own in _LAWS.items():
        given = _families if kind == "adapter" else partial(_once, f"a tiny {'run' if kind == 'report' else 'model'}")
        called = kind in ("source", "evaluator", "report")
        found += common_laws(kind, partial(_trial, kind) if called else None)
        found += [Check(kind, law, given) for law in own]
    assert {check.kind for check in found} <= KINDS.keys()
    return found
