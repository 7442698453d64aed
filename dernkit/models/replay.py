"""Push token batches through a model with one decoder layer in memory, exactly as the model's own forward would.

The model's own code makes masks, positions and rotary tables: nothing of it is written again here. Where layers pass
only hidden states on, all batches go through layer i before layer i + 1 is loaded; where they pass more (state between
layers), each batch makes one whole forward, and layers are loaded and dropped as it goes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from dernkit.errors import CheckpointError
from dernkit.models.device import home


@runtime_checkable
class Loader(Protocol):
    """Makes a decoder layer's parameters real and drops them again; a live model's loader does nothing."""

    def load(self, prefix: str) -> Any: ...

    def unload(self, prefix: str) -> Any: ...


Observe = Callable[[int], AbstractContextManager[None]]
"""``observe(layer)`` is entered while the layer runs: there hooks are attached to its blocks."""

Advance = Callable[[int, int], None]
"""``advance(layer, tokens)`` is called after each batch through each layer."""


class StopError(Exception):
    """Ends a forward whose rest is not needed."""


@torch.no_grad()
def replay(
    owner: nn.Module,
    stack: Sequence[nn.Module],
    layers: Sequence[str],
    batches: Sequence[Tensor],
    loader: Loader,
    observe: Observe,
    advance: Advance,
) -> None:
    """Run all batches through all layers.

    Args:
        owner: module that owns the decoder stack (embeddings, masks, rotary); its own parts outside the stack are real.
        stack: the decoder layers, in order.
        layers: their paths as the loader knows them.
        batches: token ids [b, s], int64, without padding.
        loader: called around each layer.
        observe: entered around each layer's forward calls.
        advance: progress.
    """
    run = _forward_by_forward if passes_state(owner, stack, layers, batches, loader) else _layer_by_layer
    run(owner, stack, layers, batches, loader, observe, advance)


def passes_state(
    owner: nn.Module, stack: Sequence[nn.Module], layers: Sequence[str], batches: Sequence[Tensor], loader: Loader
) -> bool:
    """Whether the first layer returns more than hidden states, seen on a few tokens."""
    seen: list[Any] = []

    def look(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(output)
        raise StopError

    loader.load(layers[0])
    handle = stack[0].register_forward_hook(look)
    try:
        owner(input_ids=batches[0][:1, :8].to(home(owner)), use_cache=False)
    except StopError:
        pass
    finally:
        handle.remove()
        loader.unload(layers[0])
    return isinstance(seen[0], tuple) and len(seen[0]) > 1


def _layer_by_layer(
    owner: nn.Module,
    stack: Sequence[nn.Module],
    layers: Sequence[str],
    batches: Sequence[Tensor],
    loader: Loader,
    observe: Observe,
    advance: Advance,
) -> None:
    hidden, arguments = record(owner, stack, batches)
    for index, prefix in enumerate(layers):
        loader.load(prefix)
        try:
            with observe(index):
                for batch, (args, kwargs) in enumerate(arguments[index]):
                    hidden[batch] = only_hidden(stack[index](hidden[batch], *args, **kwargs))
                    advance(index, hidden[batch].shape[0] * hidden[batch].shape[1])
        finally:
            loader.unload(prefix)
        arguments[index].clear()


def only_hidden(output: Any) -> Tensor:
    """The hidden states that a decoder layer returned.

    Raises:
        CheckpointError: there is more.
    """
    if isinstance(output, tuple):
        if len(output) > 1:
            raise CheckpointError(
                "calibration: all decoder layers must return the same kind of output. Got one that returns more than "
                "hidden states after one that does not instead. This family needs an adapter plugin."
            )
        output = output[0]
    return output


def record(
    owner: nn.Module, stack: Sequence[nn.Module], batches: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[tuple[tuple, dict]]]]:
    """First hidden states per batch, and every layer's other arguments per layer and batch (equal ones shared)."""
    hidden: list[Tensor] = []
    arguments: list[list[tuple[tuple, dict]]] = [[] for _ in stack]

    def stub(index: int) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                hidden.append(hidden_states)
            before = arguments[index][-1] if arguments[index] else arguments[index - 1][-1] if index else None
            arguments[index].append(_shared((args, kwargs), before))
            return hidden_states

        return forward

    with forwards(stack, [stub(index) for index in range(len(stack))]):
        for batch in batches:
            owner(input_ids=batch.to(home(owner)), use_cache=False)
    return hidden, arguments


@contextmanager
def forwards(stack: Sequence[nn.Module], stubs: Sequence[Callable[..., Any]]) -> Iterator[None]:
    """The decoder layers with other forwards."""
    for layer, forward in zip(stack, stubs, strict=True):
        layer.forward = forward
    try:
        yield
    finally:
        for layer in stack:
            del layer.forward


def _shared(new: Any, old: Any) -> Any:
    """``new`` with every tensor that equals the one at the same place of ``old`` replaced by it (masks repeat)."""
    if isinstance(new, Tensor):
        same = isinstance(old, Tensor) and old.shape == new.shape and old.dtype == new.dtype and torch.equal(old, new)
        return old if same else new
    if type(new) is tuple:
        olds = old if type(old) is tuple and len(old) == len(new) else (None,) * len(new)
        return tuple(_shared(a, b) for a, b in zip(new, olds, strict=True))
    if type(new) is dict:
        return {key: _shared(value, old.get(key) if type(old) is dict else None) for key, value in new.items()}
    return new


def _forward_by_forward(
    owner: nn.Module,
    stack: Sequence[nn.Module],
    layers: Sequence[str],
    batches: Sequence[Tensor],
    loader: Loader,
    observe: Observe,
    advance: Advance,
) -> None:
    handles = []
    open_contexts: dict[int, AbstractContextManager[None]] = {}

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            loader.load(layers[index])
            open_contexts[index] = observe(index)
            open_contexts[index].__enter__()

        return hook

    def after(index: int, tokens: Callable[[], int]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            open_contexts.pop(index).__exit__(None, None, None)
            loader.unload(layers[index])
            advance(index, tokens())

        return hook

    size = [0]
    for index, layer in enumerate(stack):
        handles.append(layer.register_forward_pre_hook(before(index)))
        handles.append(layer.register_forward_hook(after(index, lambda: size[0])))
    try:
        for batch in batches:
            size[0] = batch.numel()
            owner(input_ids=batch.to(home(owner)), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
