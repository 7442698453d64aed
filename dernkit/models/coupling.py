"""What follows the expert width outside the experts: shared experts and dense layers of the same config field.

They must compute what they did when the width changes. A model that counts its shared experts gets more of them, where
they are one MLP of count times width; what is left over is filled with neurons of zeros, which add nothing.
"""

from __future__ import annotations

import copy
import inspect
import re
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from dernkit.errors import CheckpointError
from dernkit.models.probe import Field, Probe, candidate_fields, compared, doubled


@dataclass(frozen=True, slots=True)
class Coupling:
    """The width's field, the tensors outside the experts that follow it, and the field that counts shared experts."""

    family: str
    width: Probe
    tensors: dict[str, dict[int, int]]
    """Name -> {dimension: its size}; the size is a multiple of the width."""
    count: Probe | None
    modules: dict[str, nn.Module] = field(default_factory=dict)
    """Path -> the MLP that holds some of the tensors."""

    @property
    def ratio(self) -> int:
        """Coupled size divided by the expert width."""
        sizes = {size for dims in self.tensors.values() for size in dims.values()}
        return max(sizes, default=0) // self.width.value

    def shared_count(self, width: int) -> int:
        """Shared experts with which nothing is lost at ``width``."""
        if self.count is None:
            return self.ratio
        return -(-self.ratio * self.width.value // width)

    def coupled_size(self, width: int) -> int:
        """Size of the coupled dimensions at a new expert width.

        Raises:
            CheckpointError: the coupled layers would lose neurons.
        """
        size = self.shared_count(width) * width
        if size < self.ratio * self.width.value:
            raise CheckpointError(
                f"{self.family}: an expert width below {self.width.value} must leave other layers as they are. Got "
                f"'{min(self.tensors)}', which follows '{'.'.join(self.width.field)}' too, instead. "
                f"Keep the width or raise it."
            )
        return size

    def fields(self, width: int) -> dict[Field, int]:
        """Config field -> value for a new width."""
        self.coupled_size(width)
        fields = {self.width.field: width}
        if self.count is not None and self.shared_count(width) != self.count.value:
            fields[self.count.field] = self.shared_count(width)
        return fields

    def padded(self, name: str, tensor: Tensor, width: int) -> Tensor:
        """A coupled tensor for a new width: zeros are added at the end of each coupled dimension."""
        for dim in self.tensors[name]:
            shape = list(tensor.shape)
            shape[dim] = self.coupled_size(width) - shape[dim]
            tensor = torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)
        return tensor

    def resize(self, path: str, width: int) -> None:
        """Set the sizes that the modules below ``path`` remember."""
        old, new = self.ratio * self.width.value, self.coupled_size(width)
        for below, module in self.modules[path].named_modules():
            for name in self.width.attributes.get(f"{path}.{below}".rstrip("."), {}):
                value = vars(module)[name]
                setattr(module, name, new if value == old else width if value == self.width.value else value)

    def describe(self) -> str:
        """In words, for people."""
        if not self.tensors:
            return "any; nothing else follows it"
        names = sorted({re.sub(r"^.*?\.?\d+\.", "", path) for path in self.modules})
        what = f"{' and '.join(names)} ({len(self.modules)} times) follow{'s' if len(names) == 1 else ''} it"
        if self.count is None:
            return f"{self.width.value} or more; {what} and is padded with zeros"
        return f"any; {what} ('{'.'.join(self.count.field)}' is set so that it fits) and is padded with zeros"


def couple(model: Any, width: Probe, experts: list[str]) -> Coupling:
    """Find what follows the width, and make sure that zero neurons change nothing there.

    Raises:
        CheckpointError: something follows that is not an MLP, or not a multiple of the width.
    """
    outside = {
        name: dims for name, dims in width.tensors.items() if not any(name.startswith(path + ".") for path in experts)
    }
    for name, dims in outside.items():
        shape = _tensor(model, name).shape
        if any(shape[dim] != growth for dim, growth in dims.items()) or len(set(dims.values())) != 1:
            raise _refusal(model, width, name)
    if len({growth for dims in outside.values() for growth in dims.values()}) > 1:
        raise _refusal(model, width, min(outside))
    coupling = Coupling(model.config.model_type, width, outside, _shared_count(model, width, outside))
    for name in outside:
        path = _mlp(model, name)
        coupling.modules[path] = model.get_submodule(path)
    checked: set[tuple[type, tuple[str, ...]]] = set()
    for path, module in coupling.modules.items():
        kind = type(module), tuple(sorted(n.removeprefix(path) for n in outside if n.startswith(path + ".")))
        if kind not in checked:
            _check_padding(model, coupling, path)
            checked.add(kind)
    return coupling


def _refusal(model: Any, width: Probe, name: str) -> CheckpointError:
    return CheckpointError(
        f"{model.config.model_type}: what follows '{'.'.join(width.field)}' outside the experts must be MLPs whose "
        f"size is a multiple of it. Got '{name}' instead. Use a merge that keeps the width."
    )


def _tensor(model: Any, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)


def _mlp(model: Any, name: str) -> str:
    """The module that owns the linear layer (or the parameter) ``name``."""
    owner = name.rpartition(".")[0]
    return owner.rpartition(".")[0] if isinstance(model.get_submodule(owner), nn.Linear) else owner


def _shared_count(model: Any, width: Probe, outside: dict[str, dict[int, int]]) -> Probe | None:
    """The field whose doubling doubles all that ``outside`` names, and nothing else."""
    if not outside:
        return None
    ratio = next(iter(next(iter(outside.values())).values())) // width.value
    for path in candidate_fields(model.config, ratio):
        if "share" not in path[-1]:  # only to save builds: what the field does is seen below
            continue
        other = doubled(model, path, ratio)
        if other is None or other.state_dict().keys() != model.state_dict().keys():
            continue
        if (probe := compared(model, other, path, ratio)).tensors == outside:
            return probe
    return None


def _check_padding(model: Any, coupling: Coupling, path: str) -> None:
    """Run a random copy of the MLP without and with zero neurons."""
    module = copy.deepcopy(coupling.modules[path]).to_empty(device="cpu").to(torch.float32).eval()
    rng = torch.Generator().manual_seed(0)
    names = [name.removeprefix(path + ".") for name in coupling.tensors if name.startswith(path + ".")]
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(generator=rng).mul_(parameter.shape[-1] ** -0.5)
        inputs = _inputs(module, _tensor(module, names[0]), coupling.tensors[f"{path}.{names[0]}"], rng)
        before = _run(model, coupling, path, module, inputs)
        wide = Coupling(coupling.family, coupling.width, coupling.tensors, None, {path: module})
        for name in names:
            owner, _, leaf = name.rpartition(".")
            padded = wide.padded(f"{path}.{name}", _tensor(module, name).data, 2 * wide.width.value)
            setattr(module.get_submodule(owner), leaf, nn.Parameter(padded, requires_grad=False))
        wide.resize(path, 2 * wide.width.value)
        after = _run(model, coupling, path, module, inputs)
    if not torch.allclose(before, after, rtol=1e-4, atol=1e-5):
        raise _refusal(model, coupling.width, f"{path}.{names[0]}")


def _inputs(module: nn.Module, like: Tensor, coupled: dict[int, int], rng: torch.Generator) -> list[Tensor]:
    """Hidden states [1, 4, H], and a coefficient per token and shared expert where the MLP takes those too."""
    hidden = [size for dim, size in enumerate(like.shape) if dim not in coupled][-1]
    inputs = [torch.randn(1, 4, hidden, generator=rng)]
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    if len(required) > 1:
        inputs.append(torch.rand(4, like.shape[0], generator=rng))
    return inputs


def _run(model: Any, coupling: Coupling, path: str, module: nn.Module, inputs: list[Tensor]) -> Tensor:
    try:
        return module(*inputs)
    except (TypeError, ValueError, RuntimeError):
        raise _refusal(model, coupling.width, path) from None
