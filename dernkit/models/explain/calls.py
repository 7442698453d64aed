"""How a model calls its modules: recorded from a run on fake tensors, which computes shapes and nothing else."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

TOKENS = 48

Call = tuple[tuple[Any, ...], dict[str, Any]]


def first_calls(model: Any, tokens: int = TOKENS) -> dict[str, Call]:
    """Module path -> arguments of its first call, tensors on the meta device. Nothing is allocated.

    The run ends early where code looks at data that is not there, as a loop over the chosen experts does; all modules
    that were called until then are in the answer.

    Args:
        model: of transformers; its weights become fake.
    """
    calls: dict[str, Call] = {}
    hooks = [
        module.register_forward_pre_hook(_Recorder(path, calls), with_kwargs=True)
        for path, module in model.named_modules()
        if path
    ]
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.to_empty(device="cpu")
            ids = torch.zeros((1, tokens), dtype=torch.int64)
            inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})
            model(**inputs, use_cache=False)
    except Exception:  # code that needs data; what was recorded before it counts
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return calls


class _Recorder:
    def __init__(self, path: str, calls: dict[str, Call]) -> None:
        self.path, self.calls = path, calls

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.path not in self.calls:
            self.calls[self.path] = tree_map(_snapshot, (args, kwargs))


def _snapshot(value: Any) -> Any:
    """Tensors without their data, caches before the model fills them."""
    with unset_fake_temporarily(), _WithoutData():
        return copy.deepcopy(value)


class _WithoutData(TorchFunctionMode):
    """Copies of tensors lie on the meta device, those inside of other objects as well."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.__deepcopy__:
            tensor, memo = args
            memo[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            return memo[id(tensor)]
        return func(*args, **(kwargs or {}))
