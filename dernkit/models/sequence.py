"""Push token batches through a model whose decoder layers change on the way: each runs as it is, then as it becomes.

As in `dernkit.models.replay`, the model's own code makes masks, positions and rotary tables, and one decoder layer is
in memory. Where layers pass more than hidden states on, the model's own forward of every batch runs in a thread of its
own that is halted wherever it calls a decoder layer: all batches wait in front of layer i until it is what it becomes.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dernkit.errors import CheckpointError
from dernkit.models.device import home
from dernkit.models.replay import Advance, Loader, Observe, StopError, forwards, only_hidden, passes_state, record

Call = tuple[tuple, dict]
"""Arguments of a decoder layer."""

Change = Callable[[], AbstractContextManager[None]]
"""Called when all batches have run through a layer; the layer is what it becomes while the context is entered."""


@torch.no_grad()
def replay_changing(
    owner: nn.Module,
    stack: Sequence[nn.Module],
    layers: Sequence[str],
    batches: Sequence[Tensor],
    loader: Loader,
    observe: Observe,
    changes: Mapping[int, Change],
    advance: Advance,
) -> None:
    """Run all batches through all layers up to the last one that changes; arguments as for `replay`.

    Args:
        changes: by layer; called with nothing of the layer in memory. The layer's outputs before it are discarded.
    """
    last = max(changes)
    with _waiting(owner, stack, layers, batches, loader) as waiting:

        def run(index: int, *, hand_on: bool) -> None:
            for batch, tokens in enumerate(batches):
                args, kwargs = waiting.call(index, batch)
                # A layer may write into a dict or cache that it is given: what it writes before its change is not kept.
                output = stack[index](*(args if hand_on else _copied(args)), **(kwargs if hand_on else _copied(kwargs)))
                if hand_on:
                    waiting.answer(batch, output)
                advance(index, tokens.numel())

        for index, prefix in enumerate(layers[: last + 1]):
            with _loaded(loader, prefix), observe(index):
                run(index, hand_on=index not in changes)
            if index in changes:
                change = changes[index]()
                if index < last:
                    with _loaded(loader, prefix), change:
                        run(index, hand_on=True)


@contextmanager
def _loaded(loader: Loader, prefix: str) -> Iterator[None]:
    loader.load(prefix)
    try:
        yield
    finally:
        loader.unload(prefix)


def _copied(value: Any) -> Any:
    """The same tensors in containers of their own; what else can hold tensors (a cache) is copied with them."""
    if isinstance(value, Tensor | nn.Module) or callable(value):
        return value
    if type(value) in (tuple, list):
        return type(value)(map(_copied, value))
    return {key: _copied(item) for key, item in value.items()} if type(value) is dict else copy.deepcopy(value)


class _Waiting(Protocol):
    """All batches, each in front of some decoder layer."""

    def call(self, index: int, batch: int) -> Call:
        """What the model calls layer ``index`` with, as often as it is asked for."""
        ...

    def answer(self, batch: int, output: Any) -> None:
        """What the layer has returned."""
        ...


@contextmanager
def _waiting(
    owner: nn.Module, stack: Sequence[nn.Module], layers: Sequence[str], batches: Sequence[Tensor], loader: Loader
) -> Iterator[_Waiting]:
    if not passes_state(owner, stack, layers, batches, loader):
        yield _Recorded(*record(owner, stack, batches))
        return
    halted = _Halted(owner, stack, batches)
    try:
        yield halted
    finally:
        halted.end()


class _Recorded:
    """Hidden states, and every layer's other arguments, which do not depend on them."""

    def __init__(self, hidden: list[Tensor], arguments: list[list[Call]]) -> None:
        self._hidden = hidden
        self._arguments = arguments

    def call(self, index: int, batch: int) -> Call:
        args, kwargs = self._arguments[index][batch]
        return (self._hidden[batch], *args), kwargs

    def answer(self, batch: int, output: Any) -> None:
        self._hidden[batch] = only_hidden(output)


class _Halted:
    """Forwards in threads, one of which runs at a time, and only while the caller waits for it."""

    def __init__(self, owner: nn.Module, stack: Sequence[nn.Module], batches: Sequence[Tensor]) -> None:
        self._stack = stack
        self._forwards = [_Forward(owner, batch) for batch in batches]
        self._answers: list[Any] = [None] * len(batches)

    def call(self, index: int, batch: int) -> Call:
        forward = self._forwards[batch]
        if forward.at < index:
            with forwards(self._stack, [_halt(layer) for layer in range(len(self._stack))]):
                forward.resume(self._answers[batch])
            self._answers[batch] = None
        if forward.at != index:
            raise CheckpointError(
                f"calibration: a model must call its decoder layers one after the other. Got layer {forward.at} "
                f"instead of {index}. Leave out calibrate.sequential."
            )
        return forward.call

    def answer(self, batch: int, output: Any) -> None:
        self._answers[batch] = output

    def end(self) -> None:
        for forward in self._forwards:
            forward.end()


def _halt(index: int) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        thread: Any = threading.current_thread()
        return thread.halt(index, (args, kwargs))

    return forward


class _Forward(threading.Thread):
    """The model's own forward of one batch."""

    def __init__(self, owner: nn.Module, batch: Tensor) -> None:
        super().__init__(daemon=True)
        self.at = -1
        """The layer that it waits for."""
        self.call: Call = ((), {})
        self._owner, self._batch = owner, batch
        self._answer: Any = None
        self._error: BaseException | None = None
        self._ended = False
        self._go, self._halted = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        try:
            self._go.acquire()
            if not self._ended:
                with torch.no_grad():  # which is a thread's own
                    self._owner(input_ids=self._batch.to(home(self._owner)), use_cache=False)
        except StopError:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self._halted.release()

    def halt(self, index: int, call: Call) -> Any:
        """In this thread: wait for what layer ``index`` returns."""
        self.at, self.call = index, call
        self._halted.release()
        self._go.acquire()
        if self._ended:
            raise StopError
        answer, self._answer = self._answer, None
        return answer

    def resume(self, answer: Any) -> None:
        """In the caller's thread: go on with a layer's output up to the next one."""
        self._answer, self.call = answer, ((), {})
        self._go.release()
        self._halted.acquire()
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        """In the caller's thread: stop where it is."""
        self._ended = True
        self._go.release()
        self.join()
