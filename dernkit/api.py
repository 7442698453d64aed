"""What a plugin imports: the protocols of all component kinds and the ``hookimpl`` marker. Nothing else is needed.

A component is a final frozen dataclass: ``name`` is the recipe's word for it, its fields are its options (typed and
bounded by ``typing.Annotated``; they become the recipe's schema), and it has the one method of its kind. It keeps no
state and does no I/O (sources and evaluators read what their options name). ``requires`` names the statistics that it
reads; calibration collects the union of what a recipe's components need, and no more. Shape letters: `dernkit.types`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol, runtime_checkable

import pluggy
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from dernkit.errors import CheckpointError, ContractError, DernkitError, PluginError, RecipeError
from dernkit.model_api import Adapter, Architecture, Block
from dernkit.observations import Observations
from dernkit.types import (
    STATISTICS,
    Assignment,
    CompressedLayer,
    ExpertBank,
    LayerDims,
    LayerPlan,
    LayerStats,
    Pool,
    Retention,
    Routing,
)

__all__ = [
    "API_VERSION",
    "Adapter",
    "Architecture",
    "Assigner",
    "Assignment",
    "BiasMerge",
    "Block",
    "Budget",
    "CheckpointError",
    "CompressedLayer",
    "ContractError",
    "DernkitError",
    "Evaluator",
    "ExpertBank",
    "KeepLimits",
    "LayerDims",
    "LayerPlan",
    "LayerStats",
    "Match",
    "Merge",
    "Narrowing",
    "Observations",
    "Observing",
    "Pairwise",
    "PluginError",
    "Pool",
    "RecipeError",
    "Refit",
    "Report",
    "Rescaling",
    "Retention",
    "Router",
    "Routing",
    "STATISTICS",
    "Scorer",
    "Selector",
    "Similarity",
    "Source",
    "Subject",
    "hookimpl",
    "Writer",
    "Writing",
]

hookimpl = pluggy.HookimplMarker("dernkit")

API_VERSION = 1
"""Version of hooks and protocols. A plugin module may say for which it was written: ``dernkit_api = 1``."""


@runtime_checkable
class Scorer(Protocol):
    """How much each expert matters."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    def score(self, bank: ExpertBank, stats: LayerStats) -> Float[Tensor, " experts"]:
        """float64 scores, higher stays; finite even for an expert that saw no token."""
        ...


@dataclass(frozen=True, slots=True)
class KeepLimits:
    """What one layer allows: ``smallest <= count <= experts`` in steps of ``multiple`` (the router's groups)."""

    layer: int
    experts: int
    smallest: int
    multiple: int


@runtime_checkable
class Budget(Protocol):
    """How many experts each layer keeps.

    ``needs_measures``: when false, `allocate` is also called with no measures, before any layer has been looked at
    (sequential calibration decides on a layer when the later ones have not run yet).
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    needs_measures: ClassVar[bool]

    def measure(self, bank: ExpertBank, scores: Float[Tensor, " experts"], stats: LayerStats) -> Tensor:
        """What `allocate` needs to know of one layer, a finite tensor of any shape; its weights are gone afterwards."""
        ...

    def allocate(self, measures: Sequence[Tensor], keep: int | float, limits: Sequence[KeepLimits]) -> list[int]:
        """Kept count per layer. ``keep``: a float in (0, 1] is a fraction, an integer a count (of each layer)."""
        ...


@runtime_checkable
class Selector(Protocol):
    """Which experts of one layer stay, once it is known how many, and which belong together.

    ``groups``: when true, what it returns has groups (:attr:`Retention.group`).
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    groups: ClassVar[bool]

    def select(self, bank: ExpertBank, scores: Float[Tensor, " experts"], count: int, stats: LayerStats) -> Retention:
        """``count`` experts, as many from each of the router's groups, with the ``scores`` it was given."""
        ...


@runtime_checkable
class Assigner(Protocol):
    """Which segments of the dropped experts go to which kept expert.

    ``needs_groups``: when true, it carries out the groups of a selector, and recipes must name one that groups.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    needs_groups: ClassVar[bool]

    def assign(self, bank: ExpertBank, retention: Retention, stats: LayerStats) -> Assignment:
        """Moves from segments of dropped experts to kept ones, with finite affinities.

        A segment that is not listed is discarded; one that is listed with several targets goes to all of them.
        """
        ...


@runtime_checkable
class Narrowing(Protocol):
    """An assigner that can leave neurons of kept experts behind also where no expert is dropped.

    Not a kind of its own: an assigner without ``narrows`` is not asked about such a layer.
    """

    @property
    def narrows(self) -> bool:
        """Whether its options say so."""
        ...


@dataclass(frozen=True, slots=True)
class Match:
    """For each segment of one dropped expert and each kept expert: the best affinity and the neuron that gives it."""

    affinity: Float[Tensor, "width kept"]
    partner: Int64[Tensor, "width kept"]
    scale: Float[Tensor, "width kept"] | None = None
    """What `Assignment.scale` becomes; None: 1."""


@runtime_checkable
class Similarity(Protocol):
    """How well one dropped expert's segments fit to the neurons of each kept expert."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    def match(self, bank: ExpertBank, dropped: int, kept: Int64[Tensor, " kept"], stats: LayerStats) -> Match:
        """Finite affinities of the segments of expert ``dropped`` with the experts ``kept``; higher fits better."""
        ...


@runtime_checkable
class Pairwise(Protocol):
    """A similarity that can also say how well every neuron of one expert fits to every neuron of another one.

    Not a kind of its own: a similarity class that has `pairs` as well can be the base of ``hungarian``.
    """

    def pairs(self, bank: ExpertBank, dropped: int, other: int, stats: LayerStats) -> Float[Tensor, "width width"]:
        """Affinity of neuron i of expert ``dropped`` (row) and neuron j of expert ``other`` (column), float32."""
        ...


@runtime_checkable
class Rescaling(Protocol):
    """A similarity that compares neurons up to ``(u, d) → (c u, d / c)``, and can say which c it means."""

    def scale(
        self, bank: ExpertBank, dropped: int, other: int, partner: Int64[Tensor, " width"], stats: LayerStats
    ) -> Float[Tensor, " width"] | None:
        """`Match.scale` for each neuron of ``dropped`` and its ``partner`` in ``other``; None: 1."""
        ...


@runtime_checkable
class Merge(Protocol):
    """How a kept expert's own segments and the arrivals become one expert.

    ``widens``: when true, every expert of the model gets the width of the largest pool (rounded up, zero-padded);
    when false the width stays.
    """

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]
    widens: ClassVar[bool]

    def merge(self, pool: Pool, width: int, rng: torch.Generator) -> Float[Tensor, "merged parts features"]:
        """At most ``width`` segments (the kernel pads with zero neurons). Never called when nothing arrives."""
        ...


@runtime_checkable
class BiasMerge(Protocol):
    """A merge that also says what becomes of a kept expert's down bias, which no segment carries.

    Not a kind of its own: where a merge class has no `merge_bias`, each expert keeps its own bias.
    """

    name: ClassVar[str]

    def merge_bias(self, pool: Pool) -> Float[Tensor, " hidden"]:
        """The new bias, float64. Called only where something arrives and `Pool.down_bias` is there."""
        ...


@runtime_checkable
class Router(Protocol):
    """How the kept experts' router rows follow from the moves."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    def update(
        self, rows: Float[Tensor, "experts row"], plan: LayerPlan, stats: LayerStats
    ) -> Float[Tensor, "kept row"]:
        """New rows. A row that the method does not change must keep its bits (float32 in, float32 out).

        Where the family adds a bias to the logits, it is the last feature of each row, and `LayerPlan.biased_rows` is
        true. Correction biases, which take part in the choice alone, are not in the rows: they are sliced.
        ``stats.router_inputs`` are what the rows are multiplied with, after any norm or projection of the router's own.
        """
        ...


@runtime_checkable
class Refit(Protocol):
    """How the down projections follow once it is settled which neurons the kept experts have."""

    name: ClassVar[str]
    requires: ClassVar[frozenset[str]]

    def refit(
        self, bank: ExpertBank, after: ExpertBank, plan: LayerPlan, stats: LayerStats
    ) -> Float[Tensor, "kept hidden width"]:
        """New down projections of all kept experts, float32.

        ``after`` is the layer as surgery leaves it: experts are numbered by their position among the kept, and
        ``after.route`` is the model's router with its new rows. Never called where nothing has changed.
        """
        ...


@runtime_checkable
class Source(Protocol):
    """Where calibration tokens come from."""

    name: ClassVar[str]

    def tokens(
        self, tokenizer: Any, sequences: int, length: int, rng: torch.Generator
    ) -> Int64[Tensor, "sequences length"]:
        """Full sequences without padding; raises RecipeError when the source is too short for one."""
        ...


@runtime_checkable
class Writer(Protocol):
    """The model, for sources that have it write."""

    def continued(
        self, prompts: Int64[Tensor, "sequences prompt"], length: int, choose: Callable[[Tensor], Tensor]
    ) -> Int64[Tensor, "sequences length"]:
        """Sequences of ``length`` tokens that begin with ``prompts`` (at least one token each).

        ``choose`` gets the logits [sequences, vocabulary] of each next token in float32 and returns the tokens
        [sequences], int64. Nothing ends a sequence early.
        """
        ...


@runtime_checkable
class Writing(Protocol):
    """A source for which the model itself writes.

    Not a kind of its own: where a source class has `write` as well, it is called in place of `tokens`.
    """

    def write(
        self, model: Writer, tokenizer: Any, sequences: int, length: int, rng: torch.Generator
    ) -> Int64[Tensor, "sequences length"]:
        """Full sequences without padding, as `Source.tokens` returns them."""
        ...


@dataclass(frozen=True, slots=True)
class Subject:
    """What an evaluator measures: a loaded ``PreTrainedModel`` in eval mode, its tokenizer and its directory."""

    model: Any
    tokenizer: Any
    path: Path
    original: Callable[[], Subject] | None = None
    """Gives the model that this one was made from (loaded at the first call); None: this is the original itself."""


@runtime_checkable
class Evaluator(Protocol):
    """A measurement of a model."""

    name: ClassVar[str]

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        """Metric name -> value. Names are stable, so that two models' results can be put side by side."""
        ...


@runtime_checkable
class Observing(Protocol):
    """An evaluator that can say what it measured on each document, which is what error bars are made from.

    Not a kind of its own: where an evaluator class has `observe` as well, `dernkit compare` pairs its documents.
    """

    def observe(self, subject: Subject) -> Mapping[str, Observations]:
        """Metric name -> what was measured on each document; the same documents in the same order for every model."""
        ...


@runtime_checkable
class Report(Protocol):
    """A document about one run."""

    name: ClassVar[str]
    filename: ClassVar[str]

    def render(self, run: Mapping[str, Any]) -> str:
        """``run`` holds the parsed artifacts: recipe, lock, plan, evaluation, sizes, timings."""
        ...
