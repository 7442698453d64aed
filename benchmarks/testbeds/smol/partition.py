"""Which neurons of a feed-forward network are always on, and which expert each of the others goes to.

After CMoE (arXiv 2502.04416): a neuron is *active* on a token when what it adds to the output is among the token's
largest; some neurons make a shared expert that is always on, and the others are clustered, in groups of one size, by
the tokens on which they are active together (as in MoEfication, arXiv 2110.01786). CMoE shares the neurons that are
active most often. Here those with the largest mean square are shared: a few neurons fire on the first token of a
sequence only, but many times as strongly as any other, and no router may miss them.
"""

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor


@dataclass(frozen=True)
class Partition:
    """Neurons of one layer: `shared` [S] and `experts` [E, I], int64, ascending within each."""

    shared: Tensor
    experts: Tensor

    @property
    def order(self) -> Tensor:
        """All neurons, the shared ones first, then expert after expert [S + E·I]."""
        return torch.cat([self.shared, self.experts.flatten()])


def active(sizes: Tensor, count: int) -> Tensor:
    """Whether a neuron is among the `count` largest of its token; bool, like `sizes` [n, W]."""
    chosen = sizes.topk(count, dim=1).indices
    return torch.zeros_like(sizes, dtype=torch.bool).scatter_(1, chosen, True)


def split_neurons(sizes: Tensor, shared: int, experts: int, count: int, rounds: int = 20) -> Partition:
    """Share out the neurons whose contributions on n tokens have the `sizes` [n, W]; `count` are active on a token.

    The `shared` neurons with the largest mean square are always on. W - `shared` must be a multiple of `experts`.
    """
    by_energy = sizes.double().square().mean(dim=0).sort(descending=True, stable=True).indices
    always, others = by_energy[:shared].sort().values, by_energy[shared:]
    marks = active(sizes, count)[:, others].float()
    groups = balanced_clusters(marks.T @ marks, experts, rounds)
    return Partition(always, others[groups].sort(dim=1).values)


def balanced_clusters(gram: Tensor, clusters: int, rounds: int) -> Tensor:
    """k-means with groups of one size, on points [J] that are known by their inner products `gram` [J, J] alone.

    The first points are the first centres. A round assigns all points at the least sum of squared distances (a linear
    assignment with as many places as there are points), then moves each centre to the mean of its group; it ends early
    when nothing moves.

    Returns:
        int64 [clusters, J / clusters], the points of each group, ascending.
    """
    size = len(gram) // clusters
    gram = gram.double()
    members = torch.zeros(len(gram), clusters, dtype=torch.float64)
    members[torch.arange(clusters), torch.arange(clusters)] = 1.0
    labels = torch.full((len(gram),), -1)
    for _ in range(rounds):
        centres = members / members.sum(dim=0)
        cross = gram @ centres
        distances = gram.diagonal()[:, None] - 2 * cross + (centres * cross).sum(dim=0)
        places = distances.repeat_interleave(size, dim=1)
        assigned = torch.from_numpy(linear_sum_assignment(places.numpy())[1]) // size
        if torch.equal(assigned, labels):
            break
        labels = assigned
        members = torch.nn.functional.one_hot(labels, clusters).double()
    return labels.sort(stable=True).indices.view(clusters, size)
