"""The protocols of what describes models: blocks, adapters, architectures. Plugins import them from `dernkit.api`."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from torch import Tensor

from dernkit.types import CompressedLayer, ExpertBank, LayerDims, Route


@runtime_checkable
class Block(Protocol):
    """One MoE block of a model whose parameters are materialised (or on the meta device, for its dims)."""

    layer: int
    path: str
    dims: LayerDims

    def bank(self) -> ExpertBank:
        """The experts and all that follows their count, as canonical tensors."""
        ...

    def route(self, ones: Mapping[str, Collection[str]] = ...) -> Route:
        """`ExpertBank.route`, with attributes (by the path of their module below the block) that are to be 1."""
        ...

    def router_kind(self) -> str:
        """What the router does with its logits, in words."""
        ...

    def width_kind(self) -> str:
        """Which expert widths are possible, and what follows the width, in words."""
        ...

    def tensors(self) -> Mapping[str, Tensor]:
        """Every tensor that follows the expert count, by its in-memory name in the model."""
        ...

    def expert_tensors(self) -> Sequence[str]:
        """The names among them that hold the routed experts' own weights."""
        ...

    def modules(self, width: int) -> Sequence[str]:
        """Paths of the modules that surgery to experts of ``width`` neurons reads: they must be real for it."""
        ...

    def resized(self, compressed: CompressedLayer) -> Mapping[str, Tensor]:
        """Those tensors after surgery, and all that follows the width if that changes.

        Raises CheckpointError when the family's width cannot change.
        """
        ...

    def check(self) -> None:
        """Raises CheckpointError when the bank's experts do not compute what the model's own forward does."""
        ...

    def replace(self, compressed: CompressedLayer) -> None:
        """Surgery: put the resized tensors, and the sizes that modules remember, into the live module.

        Once only; ``dims`` are then the new ones.
        """
        ...

    def padding(self) -> str | None:
        """The name among `ExpertBank.per_expert` of a bias that, when low, keeps an expert from ever being chosen.

        None where the router has none; then layers with fewer experts cannot be padded to the count of others.
        """
        ...

    def uneven(self) -> bool:
        """Whether the block works with a number of experts that is not the config's."""
        ...

    def on_router_inputs(self, callback: Callable[[Tensor], None]) -> Any:
        """Call ``callback(inputs [n, ·])``, before that of `on_routing`, with what `ExpertBank.route` takes."""
        ...

    def on_routing(self, callback: Callable[[Tensor, Tensor, Tensor], None]) -> Any:
        """Call ``callback(inputs [n, H], chosen [n, top_k], coefficients [n, top_k])`` at every forward.

        The coefficients are those with which the model multiplies the experts' outputs. Returns a handle with
        ``remove()``.
        """
        ...

    def config_changes(self, experts: int, width: int) -> Mapping[tuple[str, ...], int]:
        """Config field (its path from the root, under its canonical name) -> value for a new count and width."""
        ...


@runtime_checkable
class Adapter(Protocol):
    """Where a family keeps its experts."""

    name: ClassVar[str]

    def blocks(self, model: Any) -> list[Block]:
        """All MoE blocks in layer order; empty when the model is not this adapter's.

        Raises:
            CheckpointError: the model has experts that this adapter knows it cannot handle faithfully.
        """
        ...


@runtime_checkable
class Architecture(Protocol):
    """A model that transformers does not have, in three classes' worth of code.

    ``name`` is the ``model_type`` that its checkpoints' config.json has. The methods import what they return, so that
    listing plugins stays quick; they are called when a checkpoint with that model type is opened.
    """

    name: ClassVar[str]

    def config_class(self) -> type:
        """A ``PreTrainedConfig`` with that ``model_type``; its fields are those of config.json."""
        ...

    def model_class(self) -> type:
        """A ``PreTrainedModel`` that is a causal language model and is built from such a config alone."""
        ...

    def conversions(self) -> Sequence[Any]:
        """How tensors on disk become those in memory, as transformers' ``WeightConverter`` and ``WeightRenaming``.

        Empty when names and shapes are the same. dernkit writes results by the inverse of it.
        """
        ...
