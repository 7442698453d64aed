import torch
from dernkit_example import OutputEnergy

from dernkit.api import LayerStats


def test_energy_is_the_squared_norm_per_token_and_zero_for_an_expert_that_saw_none() -> None:
    squares = torch.tensor([12.0, 8.0, 0.0], dtype=torch.float64)
    stats = LayerStats(tokens=4, values={"output_sq_sum": squares, "routed": torch.tensor([4, 1, 0])})
    assert OutputEnergy().score(None, stats).tolist() == [3.0, 2.0, 0.0]
    assert OutputEnergy(frequency=False).score(None, stats).tolist() == [3.0, 8.0, 0.0]
