"""Peak memory and time of compressing a synthetic Mixtral-shaped checkpoint from disk to disk.

    python benchmarks/memory.py [--gigabytes 2] [--layers 16] [--fp8]

Writes a random fp32 checkpoint of the given size shard by shard, compresses it with DERN (half of the experts, the
best 30% of the dropped segments moved), and prints the peak resident memory above that of an interpreter with torch.
With `--fp8` the checkpoint is quantised first, in blocks of 128x128.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch

from dernkit.memory import measured, peak_bytes

BASELINE = peak_bytes()

HIDDEN, EXPERTS, VOCABULARY, HEADS = 1024, 8, 2048, 8


def write_checkpoint(folder: Path, gigabytes: float, layers: int) -> int:
    """A random checkpoint in Mixtral's published format, one shard per layer; returns its expert width."""
    from safetensors.torch import save_file
    from transformers import MixtralConfig

    attention = 4 * HIDDEN * HIDDEN
    width = int((gigabytes * 1e9 / 4 / layers - attention) / (3 * EXPERTS * HIDDEN)) // 16 * 16
    config = MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        num_local_experts=EXPERTS,
        tie_word_embeddings=False,
        architectures=["MixtralForCausalLM"],
    )
    config.save_pretrained(folder)
    rng = torch.Generator().manual_seed(0)
    weight_map: dict[str, str] = {}

    def save(tensors: dict[str, tuple[int, ...]], shard: str) -> None:
        save_file({name: 0.02 * torch.randn(shape, generator=rng) for name, shape in tensors.items()}, folder / shard)
        weight_map.update(dict.fromkeys(tensors, shard))

    names = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN), "lm_head.weight": (VOCABULARY, HIDDEN)}
    save({**names, "model.norm.weight": (HIDDEN,)}, "model-outside.safetensors")
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        shapes = {f"{prefix}self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
        shapes |= {f"{prefix}{norm}_layernorm.weight": (HIDDEN,) for norm in ("input", "post_attention")}
        shapes[f"{prefix}block_sparse_moe.gate.weight"] = (EXPERTS, HIDDEN)
        for expert in range(EXPERTS):
            for part, shape in (("w1", (width, HIDDEN)), ("w2", (HIDDEN, width)), ("w3", (width, HIDDEN))):
                shapes[f"{prefix}block_sparse_moe.experts.{expert}.{part}.weight"] = shape
        save(shapes, f"model-layer-{layer:02d}.safetensors")
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return width


def compress(folder: Path, out: Path, tokens: torch.Tensor) -> dict[str, tuple[float, int]]:
    """Stage -> (seconds, peak bytes above the baseline)."""
    from dernkit.models.source import open_source
    from dernkit.models.universal import Universal
    from dernkit.progress import Lines
    from dernkit.recipe import bind_recipe
    from dernkit.registry import Registry
    from dernkit.stages.apply import apply_checkpoint
    from dernkit.stages.calibrate import batched, calibrate_checkpoint
    from dernkit.stages.plan import plan_checkpoint

    recipe = bind_recipe(
        {
            "dernkit": 1,
            "calibrate": {"source": {"use": "text-file", "path": "none"}, "sequences": 1, "length": 2},
            "plan": {"keep": 0.5, "score": {"use": "gate-mass"}, "assign": {"use": "affinity", "quantile": 0.3}},
            "apply": {"merge": {"use": "spherical-kmeans"}, "router": {"use": "additive"}},
        },
        Registry.load(entry_points=False),
    )
    costs = {}
    source = open_source(folder, [Universal()])
    with measured() as cost:
        stats = calibrate_checkpoint(
            source, batched(tokens, 4), recipe.requires, sample_size=0, seed=0, progress=Lines()
        )
    costs["calibrate"] = (cost.seconds, cost.peak_bytes - BASELINE)
    with measured() as cost:
        plans = plan_checkpoint(source, recipe.plan, stats, Lines())
    costs["plan"] = (cost.seconds, cost.peak_bytes - BASELINE)
    with measured() as cost:
        merge, router = recipe.apply.merge, recipe.apply.router
        apply_checkpoint(source, plans, merge, router, seed=0, folder=out, key="benchmark", progress=Lines())
    costs["apply"] = (cost.seconds, cost.peak_bytes - BASELINE)
    return costs


def main() -> None:
    """Write, compress, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the checkpoint (fp32)")
    parser.add_argument("--layers", type=int, default=16, help="decoder layers, all of them MoE")
    parser.add_argument("--fp8", action="store_true", help="quantise it: a quarter of the size on disk, bf16 as read")
    parser.add_argument("--limit-gigabytes", type=float, help="exit with 1 when the peak is above this")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder, out = Path(temporary) / "source", Path(temporary) / "out"
        out.mkdir()
        width = write_checkpoint(folder, arguments.gigabytes, arguments.layers)
        if arguments.fp8:
            from dernkit.testing.quantised import quantise_fp8

            quantise_fp8(folder, 128, 128)
        size = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
        dtype = "fp8" if arguments.fp8 else "fp32"
        print(f"checkpoint: {size / 1e9:.2f} GB {dtype}, {arguments.layers} layers, 8 experts of width {width}")
        tokens = torch.randint(3, VOCABULARY, (8, 256), generator=torch.Generator().manual_seed(1))
        costs = compress(folder, out, tokens)
    for stage, (seconds, peak) in costs.items():
        print(f"{stage:<10} {seconds:6.1f} s   peak {peak / 1e9:.2f} GB above the baseline of {BASELINE / 1e9:.2f} GB")
    worst = max(peak for _, peak in costs.values())
    if arguments.limit_gigabytes is not None and worst > arguments.limit_gigabytes * 1e9:
        raise SystemExit(
            f"peak memory must stay under {arguments.limit_gigabytes} GB. Got {worst / 1e9:.2f} GB instead."
        )


if __name__ == "__main__":
    main()
