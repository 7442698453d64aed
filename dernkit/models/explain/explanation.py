"""What a MoE block is, found by experiment: `explain` and its answer.

It says what each parameter does. Names, classes and declarations are not looked at, so that a block of any family is
explained alike, and so that the answer can contradict an adapter's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dernkit.errors import CheckpointError
from dernkit.models.explain.choice import Choice, find_choice
from dernkit.models.explain.experiment import Experiment
from dernkit.models.explain.experts import Experts, Member, find_experts
from dernkit.models.explain.matrices import Matrices, find_matrices
from dernkit.models.explain.neurons import Neurons, find_neurons
from dernkit.sentences import reason


@dataclass(frozen=True, slots=True)
class Weight:
    """A parameter with a part for each expert."""

    role: str
    """gate, up, gate and up, down; each also with ``bias`` after it."""
    name: str
    """Below the block; ``*`` where each expert is a module of its own."""
    names: tuple[str, ...]
    """The parameters behind the name: one, or one for each expert."""
    dim: int
    """Dimension that counts experts (0 where each expert is a module)."""
    each: int
    """Entries of that dimension for each expert: more than 1 where experts and neurons share it."""
    transposed: bool
    """Whether an expert's matrix lies [inputs, outputs], not [outputs, inputs] as ``nn.Linear`` has it."""
    spare: int
    """Experts' worth of entries at the end that no token uses."""

    @property
    def stacked(self) -> bool:
        """Whether each expert is a module of its own."""
        return "*" in self.name


@dataclass(frozen=True, slots=True)
class Explanation:
    """What was found in one MoE block. Parameter names are those below the block."""

    experts: int
    top_k: int
    """Most experts that a token used."""
    width: int
    """Neurons of each expert; 0 when unknown."""
    hidden: int
    """Length of what an expert reads; 0 when unknown."""
    order: str
    """How gate and up rows lie: see `dernkit.models.explain.neurons.Neurons`, or unknown."""
    weights: tuple[Weight, ...]
    router: str | None
    router_rows: int
    """Rows of the router's matrix: more than experts where some belong to none."""
    choice_biases: tuple[str, ...]
    """They take part in the choice alone."""
    logit_biases: tuple[str, ...]
    """They take part in the choice and in the coefficients."""
    scales: tuple[str, ...]
    """They weigh an expert's output without a part in the choice."""
    tables: tuple[str, ...]
    """Integers that decide the choice."""
    upstream: tuple[str, ...]
    """What influences the choice besides, without an entry for each expert."""
    unexplained: tuple[str, ...]
    """What was not found, in words."""

    def weight(self, role: str) -> Weight | None:
        """The parameter with a role."""
        return next((weight for weight in self.weights if weight.role == role), None)


def explain(
    block: nn.Module, args: Sequence[Any], kwargs: dict[str, Any], where: str = "the block"
) -> Explanation | None:
    """Find experts, router and layout of ``block`` (on the meta device or not; a random copy is run).

    Args:
        args, kwargs: of one call with at least a few tokens for each expert; their values do not matter.
        where: the block's name in errors.

    Returns:
        None when no parameters are used by some tokens only.

    Raises:
        CheckpointError: the block cannot be run.
    """
    try:
        work = Experiment(block, args, kwargs)
        experts = find_experts(work)
    except Exception as error:  # whatever code of strangers raises
        raise CheckpointError(f"{where}: must run on random weights to be explained. Got '{reason(error)}'.") from error
    return None if experts is None else _explain(work, experts)


def _explain(work: Experiment, experts: Experts) -> Explanation:
    members = [member for member in experts.members if member.is_matrix]
    vectors = [member for member in experts.members if not member.is_matrix]
    if not members:  # experts of one neuron
        members, vectors = [m for m in vectors if m.size > 1], [m for m in vectors if m.size == 1]
    matrices = find_matrices(work, experts, members)
    neurons = Neurons("unknown", {}, (), ())
    unexplained = list(matrices.unexplained)
    if len(matrices.downs) == 1:
        neurons = find_neurons(work, experts, matrices, vectors)
        unexplained += neurons.unexplained
    else:
        found = ", ".join(f"'{matrix.member.name}'" for matrix in matrices.downs) or "none"
        unexplained.append(f"which one matrix leads from the neurons to the output (found {found})")
    witness = matrices.downs[0].member if matrices.downs else members[0]
    choice = find_choice(work, experts, witness, {*neurons.roles, *(member.name for member in members)})
    router, rows = _router(choice, neurons, experts, unexplained)
    decided = {router, *choice.choice_biases, *choice.logit_biases, *choice.upstream}
    unexplained += [f"what '{name}' is for" for name in experts.uneven if name not in decided]
    return Explanation(
        experts=experts.count,
        top_k=int(experts.used.sum(dim=1).max()),
        width=matrices.downs[0].inputs if len(matrices.downs) == 1 else 0,
        hidden=matrices.rows[0].inputs if matrices.rows else 0,
        order=neurons.order,
        weights=tuple(_weights(matrices, vectors, neurons, experts)),
        router=router,
        router_rows=rows,
        choice_biases=tuple(choice.choice_biases),
        logit_biases=tuple(choice.logit_biases),
        scales=tuple(name for name in neurons.coefficients if name not in decided),
        tables=tuple(choice.tables),
        upstream=tuple(choice.upstream),
        unexplained=tuple(unexplained),
    )


def _router(choice: Choice, neurons: Neurons, experts: Experts, unexplained: list[str]) -> tuple[str | None, int]:
    if len(choice.routers) == 1:
        return choice.routers[0]
    if not choice.routers:
        # Where a table of ids chooses, the router's rows only weigh the experts.
        weighing = [m for m in experts.members if m.name in neurons.coefficients and m.size > 1]
        if len(weighing) == 1:
            return weighing[0].name, weighing[0].slot.shape[weighing[0].dim]
        unexplained.append("which matrix has a row for each expert that decides about it alone")
        return None, 0
    names = ", ".join(f"'{name}'" for name, _ in choice.routers)
    unexplained.append(f"which of {names} is the router's matrix")
    return None, 0


def _weights(matrices: Matrices, vectors: list[Member], neurons: Neurons, experts: Experts) -> list[Weight]:
    transposed = {matrix.member.name: matrix.transposed for matrix in (*matrices.rows, *matrices.downs)}
    members = {matrix.member.name: matrix.member for matrix in (*matrices.rows, *matrices.downs)}
    members |= {member.name: member for member in vectors}
    return [
        Weight(
            role=role,
            name=name,
            names=members[name].slot.names,
            dim=members[name].dim,
            each=members[name].each,
            transposed=transposed.get(name, False),
            spare=members[name].slot.shape[members[name].dim] // members[name].each - experts.count,
        )
        for name, role in neurons.roles.items()
    ]
