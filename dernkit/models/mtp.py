"""Multi-token-prediction (MTP) layers: what published checkpoints hold behind the layers that transformers loads.

An MTP layer is a decoder layer of its own weights, for runtimes that draft tokens with it. It is built from the same
config fields as the model's layers, so its experts must keep up with theirs. No table of families: an MTP layer's MoE
block is what holds everything that the model's last MoE block holds, under another prefix.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from dernkit.api import Block
from dernkit.errors import CheckpointError
from dernkit.models.config_text import value_spans
from dernkit.models.probe import Field, counting_fields
from dernkit.models.store import Store

_NAMED = re.compile(r"mtp|nextn")
_COUNTS = frozenset(
    {"num_nextn_predict_layers", "num_mtp_layers", "num_mtp_modules", "mtp_num_layers", "mtp_num_hidden_layers"}
)
"""What configs call the number of MTP layers (DeepSeek and GLM; Mellum; MiniMax; LongCat; Qwen3.5)."""


@dataclass(frozen=True, slots=True)
class MtpLayer:
    """The MoE block of an MTP layer, by its tensors' names on disk."""

    path: str
    """``model.layers.61.mlp`` or ``mtp.layers.0.mlp``."""
    names: Mapping[str, str]
    """The name under which the last MoE block loads such a tensor -> the name that it has here."""
    stands_for: frozenset[str]
    """What lies in the last MoE block, in whose place these can be loaded."""


@dataclass(frozen=True, slots=True)
class Mtp:
    """All that a checkpoint holds of MTP layers."""

    layers: tuple[MtpLayer, ...] = ()
    """Those with routed experts."""
    tensors: tuple[str, ...] = ()
    """Names on disk, those of layers without routed experts included."""


def find_mtp(store: Store, last: Block) -> Mtp:
    """The MTP layers among the tensors that transformers ignores; ``last`` is the model's last MoE block.

    Raises:
        CheckpointError: experts or routers that are neither the model's nor those of such a layer.
    """
    known = _Known(store, last)
    tensors = tuple(key for key in store.ignored if known.is_mtp(key))
    layers = tuple(layer for path in known.paths(tensors) if (layer := known.layer(path, tensors)) is not None)
    known.refuse_others(layers)
    return Mtp(layers, tensors)


class _Known:
    """How the last MoE block is spelled on disk, and what else is spelled like it."""

    def __init__(self, store: Store, last: Block) -> None:
        self.store = store
        self.own = frozenset(store.keys(last.tensors()))
        self.base = _shared_start(self.own)
        """``model.layers.60.mlp.``"""
        self.inside = {target for key, target in store.target.items() if key.startswith(self.base)}
        """All of the model's tensors there, shared experts too: they follow the experts' width in some families."""
        number = re.search(rf"(?:^|\.){last.layer}\.", self.base)
        self.layer_base = self.base[: number.end()] if number else self.base
        stack = self.layer_base.removesuffix(f"{last.layer}.") if number else None
        self.numbered = None if stack is None else re.compile(rf"{re.escape(stack)}(\d+)\.(.*)")
        loaded = {layer for layer, _ in self._numbered(store.target)}
        parts = self._numbered(store.checkpoint.tensors)
        usual = {part for layer, part in parts if layer in loaded}
        self.numbers = {layer for layer, part in parts if layer not in loaded and part not in usual}
        """Layers behind the last one, with a part that no layer of the model has: `eh_proj`, norms of the inputs."""

    def _numbered(self, keys: Iterable[str]) -> list[tuple[str, str]]:
        """Layer number and the rest of the name, for those in the stack of layers."""
        matches = (self.numbered.match(key) for key in keys) if self.numbered else ()
        return [(match.group(1), match.group(2)) for match in matches if match]

    def is_mtp(self, key: str) -> bool:
        """An extra layer behind the model's last one, or something that is called MTP."""
        for number, _ in self._numbered([key]):
            return number in self.numbers
        return any(_NAMED.search(part) for part in key.split(".")[:-1])

    def paths(self, tensors: Iterable[str]) -> list[str]:
        """Prefixes under which a tensor lies that the last block has one of (its router), in the file's order."""
        feeders: dict[str, list[str]] = {}
        for key in self.own:
            feeders.setdefault(self.store.target[key], []).append(key.removeprefix(self.base))
        single = tuple(keys[0] for keys in feeders.values() if len(keys) == 1)
        found = (key.removesuffix(end) for key in tensors for end in single if key.endswith("." + end))
        return list(dict.fromkeys(found))

    def layer(self, path: str, tensors: Iterable[str]) -> MtpLayer | None:
        """The MoE block below ``path``, None when something is missing that the last one has."""
        aliases = {self.base + key.removeprefix(path): key for key in tensors if key.startswith(path)}
        fed = {alias: self.store.target_of(alias) for alias in aliases}
        names = {alias: key for alias, key in aliases.items() if fed[alias] in self.inside}
        if {fed[alias] for alias in names} != self.inside:
            return None
        stands_for = frozenset(key for key, target in self.store.target.items() if target in self.inside)
        return MtpLayer(path.removesuffix("."), names, stands_for)

    def refuse_others(self, layers: Sequence[MtpLayer]) -> None:
        explained = {key for layer in layers for key in layer.names.values()}
        for key in self.store.ignored:
            routed = "expert" in key or "router" in key or ".gate." in key
            if routed and key not in explained and not any(self._stays(key, layer) for layer in layers):
                raise CheckpointError(
                    f"{self.store.checkpoint.path}: every expert and router tensor must belong to a layer that "
                    f"transformers loads, or to a multi-token-prediction layer that has all that '{self.base[:-1]}' "
                    f"has. Got '{key}' instead. Remove that layer, or download the checkpoint again."
                )

    def _stays(self, key: str, layer: MtpLayer) -> bool:
        """Whether the layer of the last block has this tensor too, outside of the block."""
        inner = self.base.removeprefix(self.layer_base)
        beside = (layer.path + ".").removesuffix(inner)
        twin = self.layer_base + key.removeprefix(beside)
        return key.startswith(beside) and twin in self.store.target and twin not in self.own


def _shared_start(keys: Iterable[str]) -> str:
    """The parts that all names begin with, with a dot at the end."""
    columns = zip(*(key.split(".") for key in keys), strict=False)
    return "".join(f"{column[0]}." for column in takewhile(lambda column: len(set(column)) == 1, columns))


def without_mtp(config: Any, text: str) -> tuple[dict[Field, int], list[Field]]:
    """What says that there are no MTP layers: config fields -> 0, and places in the config's text that need a 0.

    A class may count layers that the text does not mention (DeepSeek-V3: one by default), and a text may count them
    where the class does not look.
    """
    places = []
    for path, (start, end) in value_spans(text).items():
        names = tuple(name for name in path if isinstance(name, str))
        if names == path and names[-1:] and names[-1] in _COUNTS and text[start:end].isdigit():
            places.append(names)
    fields = (field for field in counting_fields(config, _COUNTS) if field not in places)
    return dict.fromkeys(fields, 0), places
