"""One component for each law that breaks it, and as far as it can be, no other one."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from annotated_types import Interval

from dernkit.api import Assignment, CheckpointError, LayerPlan, Match, Observations, Pool, Retention
from dernkit.builtin.assigners import Affinity, NoMoves
from dernkit.builtin.budgets import Uniform
from dernkit.builtin.evaluators import Perplexity
from dernkit.builtin.reports import Markdown
from dernkit.builtin.scorers import GateMass
from dernkit.builtin.selectors import TopScore
from dernkit.builtin.similarities import Cosine
from dernkit.builtin.sources import TextFile
from dernkit.models.universal import Universal

NOTHING: frozenset[str] = frozenset()
TEXTS = Path(__file__).parent / "texts.jsonl"


def norms(bank: Any) -> torch.Tensor:
    return bank.down.to(torch.float64).flatten(1).norm(dim=1)


def mass(stats: Any) -> torch.Tensor:
    return stats["gate_sum"] / max(stats.tokens, 1)


@dataclass(frozen=True)
class BrokenScorer:
    """The mean coefficient, with one thing wrong."""

    name: ClassVar[str] = "broken"
    requires: ClassVar[frozenset[str]] = frozenset({"gate_sum"})
    law: str = ""

    def score(self, bank: Any, stats: Any) -> torch.Tensor:
        return getattr(self, f"_{self.law}")(bank, stats, mass(stats))

    def _determinism(self, bank: Any, stats: Any, good: Any) -> Any:
        return good * (1 + 1e-9 * torch.initial_seed())

    def _global_randomness(self, bank: Any, stats: Any, good: Any) -> Any:
        torch.rand(1)
        return good

    def _no_mutation(self, bank: Any, stats: Any, good: Any) -> Any:
        bank.router[0, 0] += 1
        return good

    def _only_declared_statistics(self, bank: Any, stats: Any, good: Any) -> Any:
        return good + stats["routed"] / max(stats.tokens, 1)

    def _only_declared_statistics_quietly(self, bank: Any, stats: Any, good: Any) -> Any:
        return good + stats.values.get("routed", 0.0) / max(stats.tokens, 1)

    def _error_sentences(self, bank: Any, stats: Any, good: Any) -> Any:
        if bank.gate is None:
            raise CheckpointError("no gate")
        return good

    def _shape(self, bank: Any, stats: Any, good: Any) -> Any:
        return good[:, None]

    def _dtype(self, bank: Any, stats: Any, good: Any) -> Any:
        return good.to(torch.float32)

    def _finite(self, bank: Any, stats: Any, good: Any) -> Any:
        return torch.where((bank.up[:, 0] == 0).all(dim=1) & (stats.tokens > 0), torch.nan, good)

    def _no_tokens(self, bank: Any, stats: Any, good: Any) -> Any:
        return good / min(stats.tokens, 1)

    def _expert_permutation(self, bank: Any, stats: Any, good: Any) -> Any:
        return good + torch.arange(len(good))

    def _neuron_permutation(self, bank: Any, stats: Any, good: Any) -> Any:
        return good + bank.up[:, 0].to(torch.float64).norm(dim=1)

    def _repeated_tokens(self, bank: Any, stats: Any, good: Any) -> Any:
        return good if stats.tokens < 60 else -good


@dataclass(frozen=True)
class Unbounded:
    """Its option has no bounds."""

    name: ClassVar[str] = "unbounded"
    requires: ClassVar[frozenset[str]] = NOTHING
    power: float = 1.0

    def score(self, bank: Any, stats: Any) -> torch.Tensor:
        return norms(bank)


@dataclass(frozen=True)
class Rounded:
    """It has another option than it was given."""

    name: ClassVar[str] = "rounded"
    requires: ClassVar[frozenset[str]] = NOTHING
    power: Annotated[float, Interval(ge=0, le=4)] = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "power", self.power + 0.5)

    def score(self, bank: Any, stats: Any) -> torch.Tensor:
        return norms(bank)


@dataclass(frozen=True)
class Stateful:
    """It keeps something that is no option."""

    name: ClassVar[str] = "stateful"
    requires: ClassVar[frozenset[str]] = NOTHING

    def __post_init__(self) -> None:
        object.__setattr__(self, "cache", lambda: None)

    def score(self, bank: Any, stats: Any) -> torch.Tensor:
        return norms(bank)


@dataclass(frozen=True)
class Falls:
    """It divides by a count of 0 where there was no token."""

    name: ClassVar[str] = "falls"
    requires: ClassVar[frozenset[str]] = frozenset({"gate_sum"})

    def score(self, bank: Any, stats: Any) -> torch.Tensor:
        return mass(stats) * (stats.tokens // stats.tokens)


@dataclass(frozen=True)
class BrokenSelector:
    """The experts with the highest scores, with one thing wrong."""

    name: ClassVar[str] = "broken"
    requires: ClassVar[frozenset[str]] = NOTHING
    groups: ClassVar[bool] = False
    law: str = ""

    def select(self, bank: Any, scores: Any, count: int, stats: Any) -> Retention:
        good = TopScore().select(bank, scores, count, stats)
        dims = bank.dims
        best = torch.argsort(scores, descending=True, stable=True)
        group = torch.full((dims.experts,), -1)
        group[good.kept] = torch.arange(count)
        match self.law:
            case "kept_count" if dims.groups == 1 and count == dims.experts - 1:
                return replace(good, kept=good.kept[1:])
            case "kept_order":
                return replace(good, kept=good.kept.flip(0))
            case "router_groups":
                return replace(good, kept=best[:count].sort().values)
            case "keeps_scores":
                return replace(good, scores=scores.sort().values)
            case "own_group":
                return replace(good, group=group.clamp(max=0))
            case "expert_permutation":
                return replace(
                    good, kept=TopScore().select(bank, -torch.arange(dims.experts).double(), count, stats).kept
                )
        return good


@dataclass(frozen=True)
class BrokenAssigner:
    """DERN's moves, with one thing wrong."""

    name: ClassVar[str] = "broken"
    requires: ClassVar[frozenset[str]] = NOTHING
    needs_groups: ClassVar[bool] = False
    law: str = ""

    def assign(self, bank: Any, retention: Retention, stats: Any) -> Assignment:
        good, width = Affinity(quantile=0.5).assign(bank, retention, stats), bank.dims.width
        match self.law:
            case "move_columns":
                object.__setattr__(good, "affinity", good.affinity[:-1])  # past the tests' checks of shapes
            case "dropped_sources" if len(good):
                return replace(good, source=torch.cat([retention.kept[:1] * width, good.source[1:]]))
            case "in_range":
                return replace(good, target=good.target + len(retention.kept))
            case "nothing_dropped" if not len(good):
                one = torch.zeros(1, dtype=torch.int64)
                return Assignment(one, one, one, torch.ones(1))
            case "expert_permutation" if len(good):
                even = good.source // width % 2 == 0
                return Assignment(good.source[even], good.target[even], good.partner[even], good.affinity[even])
            case "neuron_permutation":
                return replace(good, partner=good.source % width)
        return good


@dataclass(frozen=True)
class BrokenSimilarity:
    """Cosines, with one thing wrong."""

    name: ClassVar[str] = "broken"
    requires: ClassVar[frozenset[str]] = NOTHING
    law: str = ""

    def match(self, bank: Any, dropped: int, kept: Any, stats: Any) -> Match:
        good = Cosine().match(bank, dropped, kept, stats)
        places = torch.arange(bank.dims.width)[:, None]
        match self.law:
            case "match_shape":
                return replace(good, partner=good.partner.to(torch.int32))
            case "in_range":
                return replace(good, partner=good.partner + (good.affinity < 0.999) * bank.dims.width)
            case "kept_order":
                return replace(good, affinity=good.affinity - 0.1 * torch.arange(len(kept)))
            case "dropped_neurons":
                return replace(good, affinity=good.affinity + places)
            case "kept_neurons":
                return replace(good, affinity=good.affinity - 0.2 * good.partner * (good.affinity < 0.9))
            case "self_match":
                return replace(good, affinity=-good.affinity)
            case "self_partner":
                worst = Cosine().pairs(bank, dropped, int(kept[0]), stats).argmin(dim=1)
                return replace(good, partner=torch.cat([worst[:, None], good.partner[:, 1:]], dim=1))
            case "pairs":
                return replace(good, affinity=2 * good.affinity)
        return good


@dataclass(frozen=True)
class BrokenPairs(BrokenSimilarity):
    """The same with `pairs`."""

    name: ClassVar[str] = "broken"

    def pairs(self, bank: Any, dropped: int, other: int, stats: Any) -> torch.Tensor:
        return Cosine().pairs(bank, dropped, other, stats)


@dataclass(frozen=True)
class BrokenMerge:
    """The own neurons alone, with one thing wrong."""

    name: ClassVar[str] = "broken"
    requires: ClassVar[frozenset[str]] = NOTHING
    widens: ClassVar[bool] = False
    law: str = ""

    def merge(self, pool: Pool, width: int, rng: Any) -> torch.Tensor:
        match self.law:
            case "shape":
                return torch.cat([pool.own, 0 * pool.own[:1]])
            case "dtype":
                return pool.own.to(torch.float64)
            case "zero_weights":
                return pool.own * (pool.own_weight / torch.tensor(pool.own_weight))
            case "exact_copies":
                return pool.own * (1 + pool.affinity.mean())
            case "arrival_order":
                return pool.own * (1 + pool.incoming_weight[0] * (pool.affinity[0] < 1))
            case "neuron_permutation":
                return pool.own * (1 + pool.own[0, 0, 0] * (pool.affinity.min() < 1))
        return pool.own


@dataclass(frozen=True)
class BrokenRouter:
    """Kept rows as they are, with one thing wrong."""

    name: ClassVar[str] = "broken"
    requires: ClassVar[frozenset[str]] = NOTHING
    law: str = ""

    def update(self, rows: Any, plan: LayerPlan, stats: Any) -> torch.Tensor:
        kept = rows[plan.kept]
        receives = torch.bincount(plan.assignment.target, minlength=len(kept)) > 0
        match self.law:
            case "shape":
                return kept[:, :-1].repeat(1, 2) if kept.shape[1] == 2 else torch.cat([kept, kept[-1:]])
            case "untouched_rows":
                return kept * (1 + 1e-6)
            case "expert_permutation":
                kept[receives] += plan.kept[receives, None]
        return kept


@dataclass(frozen=True)
class BrokenRefit:
    """Projections as they are, with one thing wrong."""

    name: ClassVar[str] = "broken"
    requires: ClassVar[frozenset[str]] = frozenset({"sample"})
    law: str = ""

    def refit(self, bank: Any, after: Any, plan: LayerPlan, stats: Any) -> torch.Tensor:
        down = after.down.to(torch.float32, copy=True)
        match self.law:
            case "shape":
                return torch.cat([down, down[-1:]])
            case "never_worse":
                return down + 3.0
        return down


@dataclass(frozen=True)
class BrokenBudget:
    """The same share everywhere, with one thing wrong."""

    name: ClassVar[str] = "broken"
    requires: ClassVar[frozenset[str]] = NOTHING
    needs_measures: ClassVar[bool] = True
    law: str = ""

    def measure(self, bank: Any, scores: Any, stats: Any) -> Any:
        return 1.0 if self.law == "measures" else scores[:2]

    def allocate(self, measures: Any, keep: Any, limits: Any) -> list[int]:
        good = Uniform().allocate([], keep, limits)
        step, least = limits[0].multiple, limits[0].smallest
        shrinkable = good[0] - step >= least and keep != 1.0
        match self.law:
            case "in_range" if keep != 1.0:
                return [1 for _ in good]
            case "within_budget" if keep != 1.0 and good[0] + step <= limits[0].experts:
                return [count + step for count in good]
            case "keep_all" if keep == 1.0 and shrinkable is False:
                return [limits[0].smallest for _ in good]
            case "layer_order" if shrinkable:
                return [good[0] - step, *good[1:]]
            case "expert_permutation" if shrinkable:
                return [count - step * bool(seen[0] > seen[1]) for count, seen in zip(good, measures, strict=True)]
        return good


@dataclass(frozen=True)
class BrokenSource:
    """A text, with one thing wrong."""

    name: ClassVar[str] = "broken"
    law: str = ""

    def tokens(self, tokenizer: Any, sequences: int, length: int, rng: Any) -> torch.Tensor:
        if self.law == "too_short" and length > 1000:
            return torch.zeros(sequences, 1, dtype=torch.int64)
        good = TextFile(TEXTS).tokens(tokenizer, sequences, length, rng)
        match self.law:
            case "shape":
                return good[:, :-1]
            case "dtype":
                return good.to(torch.int32)
            case "in_range":
                return good + 1000
            case "determinism":
                return good.roll(random.randrange(1, 1000))
        return good


@dataclass(frozen=True)
class BrokenEvaluator:
    """A loss that is not a number."""

    name: ClassVar[str] = "broken"

    def evaluate(self, subject: Any) -> Mapping[str, float]:
        return {"loss": float("nan")}


@dataclass(frozen=True)
class BrokenObserver:
    """Perplexity by document, with one thing wrong."""

    name: ClassVar[str] = "broken"
    law: str = ""

    def evaluate(self, subject: Any) -> Mapping[str, float]:
        found = Perplexity(TEXTS, length=32).evaluate(subject)
        match self.law:
            case "adds_up":
                return {"texts/loss": found["texts/perplexity"]}
            case "adds_up_to_nothing":
                return {"loss": found["texts/loss"]}
        return {"texts/loss": self._loss(subject)["loss"].by_group()["texts"]}

    def observe(self, subject: Any) -> Mapping[str, Observations]:
        return self._loss(subject)

    def _loss(self, subject: Any) -> Mapping[str, Observations]:
        seen = Perplexity(TEXTS, length=32).observe(subject)["loss"]
        match self.law:
            case "observed_numbers":
                return {"loss": replace(seen, documents=("texts",) * len(seen.documents))}
            case "same_documents":
                order = np.argsort(seen.values)
                return {"loss": replace(seen, documents=tuple(seen.documents[place] for place in order))}
            case "original_of_itself":
                return {"loss": replace(seen, values=seen.values + (subject.original is not None))}
        return {"loss": seen}


@dataclass(frozen=True)
class Trains:
    """It leaves the model in training mode."""

    name: ClassVar[str] = "trains"

    def evaluate(self, subject: Any) -> Mapping[str, float]:
        subject.model.train()
        return {"loss": 1.0}


@dataclass(frozen=True)
class Empty:
    """A document without what it is about."""

    name: ClassVar[str] = "empty"
    filename: ClassVar[str] = "empty.md"

    def render(self, run: Mapping[str, Any]) -> str:
        return "# Done\n"


@dataclass(frozen=True)
class Consumes:
    """It takes out of the facts what it has written."""

    name: ClassVar[str] = "consumes"
    filename: ClassVar[str] = "consumed.md"

    def render(self, run: Mapping[str, Any]) -> str:
        text = Markdown().render(run)
        run["source"]["experts"] += 1
        return text


@dataclass(frozen=True)
class BrokenAdapter:
    """The built-in adapter, with one thing wrong."""

    name: ClassVar[str] = "broken"
    law: str = ""

    def blocks(self, model: Any) -> Any:
        good = Universal().blocks(model)
        if self.law == "only_its_own":
            return tuple(good)
        return [Shifted(block) for block in good]


class Shifted:
    """A block whose tensors come back changed."""

    def __init__(self, block: Any) -> None:
        self.block = block

    def __getattr__(self, name: str) -> Any:
        return getattr(self.block, name)

    def resized(self, compressed: Any) -> Mapping[str, torch.Tensor]:
        return {name: tensor + 1 for name, tensor in self.block.resized(compressed).items()}


@dataclass(frozen=True)
class BrokenArchitecture:
    """Mixtral under another name, with one thing wrong."""

    name: ClassVar[str] = "broken_moe"
    law: str = ""

    def config_class(self) -> type:
        from transformers import MixtralConfig

        return type("Config", (MixtralConfig,), {"model_type": "mixtral" if self.law == "model_type" else "broken_moe"})

    def model_class(self) -> type:
        from transformers import MixtralForCausalLM

        return dict if self.law == "model_of_config" else MixtralForCausalLM

    def conversions(self) -> Any:
        return ["a.b"] if self.law == "listed_conversions" else []


GOOD = (BrokenObserver(), GateMass(), TopScore(), NoMoves(), Affinity(), Cosine(), Uniform())
