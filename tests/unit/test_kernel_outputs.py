import pytest
import torch

from dernkit.kernel.outputs import layer_output, segment_activations
from dernkit.testing.banks import random_bank, random_stats


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_an_expert_is_the_sum_of_its_neurons(gated: bool, bias: bool) -> None:
    bank = random_bank(gated=gated, bias=bias)
    inputs = random_stats(bank)["sample"]
    segments = bank.segments(2)
    neurons = segment_activations(segments, bank.act, inputs)
    total = neurons @ segments[:, -1, : bank.dims.hidden]
    if bank.down_bias is not None:
        total = total + bank.down_bias[2]
    torch.testing.assert_close(total, bank.output(2, inputs))


def test_the_layers_output_is_the_sum_of_what_chosen_experts_add() -> None:
    bank = random_bank()
    inputs = random_stats(bank)["sample"]
    assert bank.route is not None
    routing = bank.route(inputs, torch.tensor([0, 2, 3]))
    assert not (routing.chosen == 1).any()
    expected = torch.zeros_like(inputs)
    for token in range(len(inputs)):
        for place in range(2):
            expert, coefficient = int(routing.chosen[token, place]), routing.coefficients[token, place]
            expected[token] += coefficient * bank.output(expert, inputs[token : token + 1])[0]
    torch.testing.assert_close(layer_output(bank, inputs, routing), expected)
