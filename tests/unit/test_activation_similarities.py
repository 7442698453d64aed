import pytest
import torch

from dernkit.builtin import activation_similarities
from dernkit.builtin.activation_similarities import ActivationCorrelation, OutputContribution
from dernkit.kernel import correlation, matching
from dernkit.kernel.correlation import activation_rows, centred
from dernkit.kernel.outputs import segment_activations
from dernkit.testing.banks import random_bank, random_stats

KEPT = torch.tensor([0, 2])
BOTH = [ActivationCorrelation(), OutputContribution()]


def test_rows_are_the_activations_neuron_by_neuron(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = random_bank(bias=True)
    segments, inputs = bank.segments(1), random_stats(bank)["sample"]
    whole = activation_rows(segments, bank.act, inputs)
    torch.testing.assert_close(whole, segment_activations(segments, bank.act, inputs).T)
    monkeypatch.setattr(correlation, "BUDGET", 4 * len(inputs) * 3)
    pieces = []
    activation = correlation.segment_activations
    monkeypatch.setattr(
        correlation, "segment_activations", lambda s, a, i: pieces.append(len(s)) or activation(s, a, i)
    )
    torch.testing.assert_close(activation_rows(segments, bank.act, inputs), whole)
    assert pieces == [3, 3, 2]


def test_centred_rows_have_mean_0_and_constant_ones_are_exactly_0() -> None:
    rows = 5 + torch.randn(6, 50, generator=torch.Generator().manual_seed(0))
    rows[2] = 0.1
    rows[3] = 1000 + 1e-4 * rows[0]
    rows[4] = 1e-20 * rows[0]
    done = centred(rows)
    assert float((done.double().mean(1) / rows.double().mean(1)).abs().max()) < 1e-7
    assert not done[2].any() and not done[3].any() and bool(done[4].any())


@pytest.mark.parametrize("similarity", BOTH, ids=repr)
def test_matches_do_not_depend_on_the_pieces(similarity, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = random_bank(3, 40, 8)
    stats = random_stats(bank, sample=64)
    whole = similarity.match(bank, 1, KEPT, stats)
    monkeypatch.setattr(matching, "BUDGET", 4 * 40 * 3)
    monkeypatch.setattr(matching, "CACHE", 1000)
    pieces = similarity.match(bank, 1, KEPT, stats)
    assert torch.equal(pieces.affinity, whole.affinity) and torch.equal(pieces.partner, whole.partner)


@pytest.mark.parametrize("similarity", BOTH, ids=repr)
def test_bitwise_equal_neurons_tie_to_the_first(similarity) -> None:
    bank = random_bank(2, 61, 7)
    for neuron in range(5, 61):
        bank.gate[0, neuron], bank.up[0, neuron] = bank.gate[0, neuron % 5], bank.up[0, neuron % 5]
        bank.down[0, :, neuron] = bank.down[0, :, neuron % 5]
    match = similarity.match(bank, 1, torch.tensor([0]), random_stats(bank))
    assert int(match.partner.max()) < 5


def test_activations_do_not_see_the_down_part() -> None:
    bank = random_bank(3, 6, 4)
    bank.gate[1], bank.up[1] = bank.gate[2], bank.up[2]
    stats = random_stats(bank)
    assert torch.equal(ActivationCorrelation().match(bank, 1, KEPT, stats).affinity[:, 1], torch.ones(6))
    assert bool((OutputContribution().match(bank, 1, KEPT, stats).affinity[:, 1] < 1).all())


def test_of_the_sample_only_the_first_tokens_are_looked_at() -> None:
    bank = random_bank(3, 6, 4)
    stats = random_stats(bank, sample=16)
    first = {**stats.values, "sample": stats["sample"][:7]}
    for kind in (ActivationCorrelation, OutputContribution):
        one = kind(tokens=7).match(bank, 1, KEPT, stats)
        other = kind(tokens=100).match(bank, 1, KEPT, type(stats)(7, first))
        assert torch.equal(one.affinity, other.affinity)
        assert not torch.equal(one.affinity, kind(tokens=100).match(bank, 1, KEPT, stats).affinity)


def test_nothing_but_the_sample_is_required() -> None:
    for component in activation_similarities.dernkit_similarities():
        assert component().requires == {"sample"}
