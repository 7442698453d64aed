"""Have a model write, with one decoder layer in memory where it does not lie there already."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn

from dernkit.errors import CheckpointError
from dernkit.models.device import home
from dernkit.models.replay import Loader
from dernkit.models.stack import Stack


@dataclass(frozen=True, slots=True)
class ModelWriter:
    """`Writer` on a causal language model in eval mode: what lies outside the decoder layers is real."""

    model: Any
    stack: Stack
    loader: Loader

    @torch.no_grad()
    def continued(
        self, prompts: Int64[Tensor, "sequences prompt"], length: int, choose: Callable[[Tensor], Tensor]
    ) -> Int64[Tensor, "sequences length"]:
        """See `Writer`. Keys and values of all layers stay in memory while a batch is written.

        Raises:
            CheckpointError: the model gives no logits, or some that are not finite.
        """
        if not isinstance(self.model.get_output_embeddings(), nn.Module):
            raise CheckpointError(
                f"{self.model.config.model_type}: a model that writes its own calibration text must have a "
                f"language-model head. Got {type(self.model).__name__} without one instead. Calibrate on text."
            )
        tokens, cache = prompts, None
        device = home(self.model)
        caches = "past_key_values" in inspect.signature(self.model.forward).parameters
        with self._one_layer_at_a_time():
            while tokens.shape[1] < length:
                given = tokens if cache is None else tokens[:, -1:]
                kept = {"past_key_values": cache, "use_cache": True} if caches else {"use_cache": False}
                found = self.model(input_ids=given.to(device), **kept)
                cache = getattr(found, "past_key_values", None)
                logits = found.logits[:, -1].cpu().to(torch.float32)
                if not bool(logits.isfinite().all()):
                    raise CheckpointError(
                        "self-generated text: logits must be finite. Got NaN or infinity instead. The model overflows: "
                        "set 'dtype' in config.json to float32, or calibrate on text."
                    )
                tokens = torch.cat([tokens, choose(logits)[:, None]], dim=1)
        return tokens

    @contextmanager
    def _one_layer_at_a_time(self) -> Iterator[None]:
        handles = []
        for layer, path in zip(self.stack.layers, self.stack.paths, strict=True):
            handles.append(layer.register_forward_pre_hook(self._loading(path)))
            handles.append(layer.register_forward_hook(self._unloading(path)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _loading(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            self.loader.load(path)

        return hook

    def _unloading(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            self.loader.unload(path)

        return hook
