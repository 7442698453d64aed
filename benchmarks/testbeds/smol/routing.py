"""A router in closed form: a ridge regression from a layer's input to how much each expert contributes."""

import torch
from torch import Tensor


def ridge(inputs: Tensor, targets: Tensor, strength: float) -> Tensor:
    """Rows [t, H] of the linear map from `inputs` [n, H] that fits `targets` [n, t] best, in float64.

    The penalty is `strength` times the mean square of an input's feature, a token.
    """
    inputs, targets = inputs.double(), targets.double()
    gram = inputs.T @ inputs
    gram.diagonal().add_(strength * gram.diagonal().mean())
    return torch.linalg.solve(gram, inputs.T @ targets).T


def contributions(hidden: Tensor, experts: Tensor, down: Tensor) -> Tensor:
    """The norm of what each expert adds to the output [n, E].

    Args:
        hidden: activations of all neurons [n, W].
        experts: the neurons of each expert [E, I].
        down: the down projection [H, W].
    """
    return torch.stack([(hidden[:, own] @ down[:, own].T).norm(dim=1) for own in experts], dim=1)


def fit_router(inputs: Tensor, wanted: Tensor, top_k: int, spread: float, strength: float, floor: float) -> Tensor:
    """Router rows [E, H] that prefer the experts with the largest `wanted` [n, E] on `inputs` [n, H].

    The targets are logarithms, standardised expert by expert so that none is preferred for its size alone; `spread` is
    the root mean square of a token's logits about their mean. Experts that fewer than `floor` of the tokens choose are
    raised along the direction of the input that is closest to a constant, for the model's router has no bias.
    """
    targets = wanted.clamp_min(1e-9).log()
    targets = (targets - targets.mean(dim=0)) / targets.std(dim=0).clamp_min(1e-9)
    fitted = ridge(inputs, torch.cat([targets, torch.ones(len(inputs), 1)], dim=1), strength)
    rows, constant = fitted[:-1], fitted[-1]
    rows = rows * (spread / centred(inputs.double() @ rows.T).square().mean().sqrt())
    return raise_starved(inputs.double(), rows, constant, top_k, floor).float()


def raise_starved(
    inputs: Tensor, rows: Tensor, constant: Tensor, top_k: int, floor: float, rounds: int = 200
) -> Tensor:
    """Add multiples of `constant` [H] to the rows of experts below `floor`, at most `rounds` times."""
    rows = rows.clone()
    step = 0.05 * centred(inputs @ rows.T).square().mean().sqrt()
    for _ in range(rounds):
        starved = shares(inputs @ rows.T, top_k) < floor
        if not starved.any():
            break
        rows[starved] += step * constant
    return rows


def centred(logits: Tensor) -> Tensor:
    """`logits` [n, E] less each token's mean."""
    return logits - logits.mean(dim=1, keepdim=True)


def coefficients(logits: Tensor, top_k: int) -> Tensor:
    """What the model multiplies each expert's output with [n, E]: a softmax over the `top_k` largest, 0 elsewhere."""
    values, chosen = logits.topk(top_k, dim=1)
    return torch.zeros_like(logits).scatter_(1, chosen, values.softmax(dim=1))


def shares(logits: Tensor, top_k: int) -> Tensor:
    """The part of the tokens that choose each expert [E]; they sum to `top_k`."""
    return (coefficients(logits, top_k) > 0).double().mean(dim=0)
