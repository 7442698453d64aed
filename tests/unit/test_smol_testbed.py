"""The carved testbed: exact when all experts are on, balanced, and in closed form."""

import itertools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from benchmarks.testbeds.smol.carve import Carving, carve, carve_layer
from benchmarks.testbeds.smol.checkpoint import assemble, save
from benchmarks.testbeds.smol.correction import Corrector
from benchmarks.testbeds.smol.measure import expert_shares, losses
from benchmarks.testbeds.smol.partition import balanced_clusters, split_neurons
from benchmarks.testbeds.smol.routing import coefficients, fit_router, raise_starved, ridge, shares


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-5,
        initializer_range=0.2,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids():
    return torch.randint(96, (12, 24), generator=torch.Generator().manual_seed(1))


def test_with_all_experts_on_the_carved_model_is_the_dense_one(llama, ids):
    plan = Carving(shared=16, experts=4, top_k=4, spread=1e-6, floor=0.0, down_ridge=None)
    model = assemble(llama, list(carve(llama, ids, plan)))
    with torch.no_grad():
        expected, got = llama(ids).logits, model(ids).logits
    assert expected.std() > 0.5
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_the_saved_model_does_what_the_carved_layers_say(llama, ids, tmp_path):
    """Half of the experts on: the model's own routing gives the block outputs that the layers were fitted with."""
    plan = Carving(shared=16, experts=8, top_k=3, spread=0.3)
    layers = list(carve(llama, ids, plan))
    model = assemble(llama, layers)
    inputs = random(40, 32, seed=3)
    mlp = llama.model.layers[1].mlp
    with torch.no_grad():
        hidden = torch.nn.functional.silu(mlp.gate_proj(inputs)) * mlp.up_proj(inputs)
        expected = layers[1].features(inputs, hidden) @ layers[1].down.T
        got = model.model.layers[1].mlp(inputs[None])[0]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
    found = expert_shares(model, {"all": ids})
    assert found.shape == (2, 8) and torch.allclose(found.sum(dim=1), torch.full((2,), 3.0, dtype=torch.float64))

    class NoTokenizer:
        save_pretrained = staticmethod(lambda folder: None)

    before = losses(model, {"all": ids})["all"]
    save(model, NoTokenizer, tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert losses(again, {"all": ids})["all"] == pytest.approx(before, abs=0.05)


def test_correction_and_catching_up_bring_the_output_nearer_to_the_dense_one(llama, ids):
    def distance(plan):
        model = assemble(llama, list(carve(llama, ids, plan)))
        with torch.no_grad():
            return (model(ids).logits - llama(ids).logits).square().mean()

    sizes = {"shared": 16, "experts": 8, "top_k": 3}
    assert distance(Carving(**sizes)) < 0.8 * distance(Carving(**sizes, down_ridge=None))


def test_clusters_have_one_size_and_find_the_groups_that_are_there():
    groups = torch.arange(24).view(4, 6)[:, torch.randperm(6)].T.flatten() // 6
    marks = torch.nn.functional.one_hot(groups, 4).T.double().repeat_interleave(50, dim=0)
    marks = marks + 0.1 * random(200, 24).double()
    found = balanced_clusters(marks.T @ marks, 4, 20)
    assert found.shape == (4, 6)
    assert {tuple(row.tolist()) for row in found} == {tuple((groups == g).nonzero()[:, 0].tolist()) for g in range(4)}


def test_clusters_are_as_good_as_the_best_of_all_balanced_ones_of_six_points():
    points = random(5, 6, seed=2).double()

    def cost(groups):
        return sum(float((points[:, g] - points[:, g].mean(dim=1, keepdim=True)).square().sum()) for g in groups)

    every = [
        [list(half), [i for i in range(6) if i not in half]]
        for half in itertools.combinations(range(6), 3)
        if 0 in half
    ]
    found = balanced_clusters(points.T @ points, 2, 20).tolist()
    assert found in every
    assert cost(found) <= sorted(cost(groups) for groups in every)[2]


def test_every_neuron_has_one_place_and_the_strongest_are_shared():
    sizes = random(60, 20).abs()
    sizes[:, 7] *= 20
    sizes[0, 11] = 500.0
    partition = split_neurons(sizes, shared=8, experts=3, count=5)
    assert sorted(partition.order.tolist()) == list(range(20))
    assert partition.experts.shape == (3, 4)
    assert {7, 11} <= set(partition.shared.tolist())


def test_ridge_is_the_solution_of_its_normal_equations_in_python():
    inputs, targets = random(30, 3), random(30, 2, seed=1)
    rows = [[float(v) for v in row] for row in inputs]
    gram = [[sum(row[i] * row[j] for row in rows) for j in range(3)] for i in range(3)]
    penalty = 0.1 * sum(gram[i][i] for i in range(3)) / 3
    fitted = ridge(inputs, targets, 0.1)
    for target in range(2):
        for i in range(3):
            left = sum((gram[i][j] + penalty * (i == j)) * float(fitted[target, j]) for j in range(3))
            right = sum(row[i] * float(targets[n, target]) for n, row in enumerate(rows))
            assert left == pytest.approx(right, rel=1e-9, abs=1e-9)


def test_router_prefers_the_experts_that_contribute_most():
    inputs = random(2000, 16)
    truth = random(6, 16, seed=1)
    wanted = (inputs @ truth.T).exp()
    router = fit_router(inputs, wanted, top_k=2, spread=0.2, strength=1e-6, floor=0.0)
    logits = inputs @ router.T
    deviation = logits - logits.mean(dim=1, keepdim=True)
    assert float(deviation.square().mean().sqrt()) == pytest.approx(0.2, rel=1e-3)
    standard = (inputs @ truth.T) / (inputs @ truth.T).std(dim=0)
    agree = (coefficients(logits, 2) > 0) == (coefficients(standard, 2) > 0)
    assert agree.float().mean() > 0.97


def test_starved_experts_are_raised_to_the_floor():
    inputs = random(2000, 16).double()
    inputs[:, 0] = 3.0
    constant = torch.zeros(16, dtype=torch.float64)
    constant[0] = 1 / 3
    rows = random(6, 16, seed=1).double()
    rows[2] -= 30 * constant
    assert shares(inputs @ rows.T, 2)[2] < 0.01
    raised = raise_starved(inputs, rows, constant, 2, 0.05)
    assert shares(inputs @ raised.T, 2).min() >= 0.05
    others = torch.tensor([0, 1, 3, 4, 5])
    assert torch.equal(raised[others], rows[others])


def test_coefficients_are_a_softmax_over_the_chosen_in_python():
    logits = random(5, 4)
    got = coefficients(logits, 2)
    for row, values in zip(got, logits.tolist(), strict=True):
        chosen = sorted(range(4), key=lambda i: -values[i])[:2]
        total = sum(2.718281828459045 ** values[i] for i in chosen)
        for i in range(4):
            assert float(row[i]) == pytest.approx(2.718281828459045 ** values[i] / total * (i in chosen), abs=1e-6)


def test_correction_minimises_error_plus_penalty():
    features, start, targets = random(50, 6), random(3, 6, seed=1), random(50, 3, seed=2)
    features[:, 4] = 0.0
    sums = Corrector(6, 3)
    sums.add(features[:20], targets[:20])
    sums.add(features[20:], targets[20:])
    down = sums.solve(start, 0.1)
    assert torch.equal(down[:, 4], start[:, 4])

    def objective(d):
        change = (d - start).double().square().sum(dim=0)
        return float((features @ d.T - targets).double().square().sum() + 0.1 * (sums.gram.diagonal() * change).sum())

    best = objective(down)
    for seed in range(5):
        assert objective(down + 0.01 * random(3, 6, seed=seed + 10)) > best


def test_uncorrected_down_projections_are_those_of_the_dense_network_times_top_k():
    hidden, down, inputs = random(80, 20), random(4, 20, seed=1), random(80, 4, seed=2)
    layer = carve_layer(down, inputs, hidden, hidden @ down.T, torch.ones(80), Carving(8, 4, 2, down_ridge=None))
    routed = layer.partition.experts.flatten()
    assert torch.equal(layer.down[:, routed], 2 * down[:, routed])
    assert torch.equal(layer.down[:, layer.partition.shared], down[:, layer.partition.shared])
