"""Train a testbed of many small experts from scratch: Qwen2-MoE or DeepSeek-V2 layers, with shared experts.

    python -m benchmarks.testbeds.fine_grained qwen2-moe --minutes 110 --work-dir WORK --out OUT

Unlike the Mixtral testbed there is no dense phase: the experts have no common ancestor. Data, tokenizer, schedule,
optimizer and the losses on routing are those of `benchmarks.testbeds.mixtral`.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from benchmarks.testbeds.corpus import HERE, load_splits
from benchmarks.testbeds.mixtral.data import SPECIAL, WindowSampler, load_streams, train_tokenizer
from benchmarks.testbeds.mixtral.recipe import routing_losses, token_loss
from benchmarks.testbeds.mixtral.run_state import learning_rate, make_optimizer, save_model
from benchmarks.testbeds.routing import measure, report, router_logits

VOCABULARY = 4096
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "pad_token_id": SPECIAL.index("<pad>"),
    "bos_token_id": SPECIAL.index("<bos>"),
    "eos_token_id": SPECIAL.index("<eos>"),
}
TESTBEDS: dict[str, tuple[type[PreTrainedModel], PreTrainedConfig]] = {
    "qwen2-moe": (
        Qwen2MoeForCausalLM,
        Qwen2MoeConfig(
            **COMMON,
            num_key_value_heads=4,
            num_experts=32,
            moe_intermediate_size=56,
            shared_expert_intermediate_size=128,
            intermediate_size=128,
            norm_topk_prob=False,
        ),
    ),
    "deepseek": (
        DeepseekV2ForCausalLM,
        DeepseekV2Config(
            **COMMON,
            num_key_value_heads=8,
            n_routed_experts=32,
            n_shared_experts=2,
            moe_intermediate_size=64,
            intermediate_size=512,
            first_k_dense_replace=1,
            topk_method="greedy",
            routed_scaling_factor=1.0,
            q_lora_rank=None,
            kv_lora_rank=64,
            qk_nope_head_dim=32,
            qk_rope_head_dim=16,
            v_head_dim=32,
        ),
    ),
}


def build(name: str, seed: int) -> Any:
    """A randomly initialised model; output projections start smaller, by the usual depth factor."""
    torch.manual_seed(seed)
    cls, config = TESTBEDS[name]
    model = cls(config)
    scale = (2 * config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for path, weight in model.named_parameters():
            if "o_proj" in path or "down_proj" in path:
                weight.mul_(scale)
    model.set_experts_implementation("sorted")
    return model.train()


@torch.no_grad()
def measured(model: Any, tokenizer: PreTrainedTokenizerFast, text: str, windows: int) -> tuple[float, Tensor]:
    """Loss in nats a token and each layer's expert shares [layers, E] on the first windows of 256 tokens."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    targets = torch.stack(ids.split(255)[:windows][: len(ids) // 255])
    inputs = nn.functional.pad(targets, (1, 0), value=tokenizer.bos_token_id)[:, :-1]
    with router_logits(model) as logits:
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    loss = token_loss(model, hidden, targets)
    shares = routing_losses(tuple(logits), model.config.num_experts_per_tok)[2]
    return float(loss), shares


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", choices=list(TESTBEDS))
    add = parser.add_argument
    add("--minutes", type=float, default=110, help="time budget")
    add("--work-dir", type=Path, required=True, help="folder for the token cache")
    add("--out", type=Path, required=True, help="folder for curve.jsonl and model/")
    add("--corpus", type=Path, default=HERE / "corpus", help="folder of *.txt.xz files")
    add("--seq-len", type=int, default=256, help="tokens a sequence")
    add("--batch-tokens", type=int, default=4096, help="tokens a step")
    add("--cap-tokens", type=int, default=1_500_000, help="largest size a domain is drawn in proportion to")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--decay-share", type=float, default=0.5, help="share of the budget over which the rate falls to zero")
    add("--warmup-share", type=float, default=0.02, help="share of the budget for a warm-up")
    add("--weight-decay", type=float, default=0.1, help="on matrices only")
    add("--balance", type=float, default=0.05, help="coefficient of the per-layer load-balancing loss")
    add("--z-loss", type=float, default=1e-3, help="coefficient of the router z-loss")
    add("--save-minutes", type=float, default=5, help="time between checkpoints")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Spend the time budget, logging to ``curve.jsonl`` and saving now and then."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    args.work_dir.mkdir(parents=True, exist_ok=True)
    splits = load_splits(args.corpus)
    tokenizer = train_tokenizer(splits, VOCABULARY)
    streams = load_streams(splits, tokenizer, args.work_dir / "tokens.npz")
    sampler = WindowSampler(streams, args.cap_tokens, tokenizer.bos_token_id, args.seed)
    model = build(args.testbed, args.seed)
    optimizer = make_optimizer(model, args)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    began, steps, tokens, saved = time.monotonic(), 0, 0, 0.0
    window: list[float] = []
    with (args.out / "curve.jsonl").open("w") as curve:
        while (progress := (time.monotonic() - began) / (60 * args.minutes)) < 1:
            batch = sampler.batch(args.batch_tokens // args.seq_len, args.seq_len)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args, progress, 0.0)
            with router_logits(model) as logits:
                hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
            loss = token_loss(model, hidden, batch[:, 1:])
            balance, squares, _ = routing_losses(tuple(logits), model.config.num_experts_per_tok)
            (loss + args.balance * balance + args.z_loss * squares).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            steps, tokens = steps + 1, tokens + batch[:, 1:].numel()
            window.append(loss.item())
            elapsed = time.monotonic() - began
            if elapsed - saved >= 60 * args.save_minutes:
                saved = elapsed
                save_model(model, tokenizer, args.out / "model")
                found = [measured(model, tokenizer, split.heldout[:40_000], 6) for split in splits]
                shares = torch.stack([share for _, share in found]).mean(dim=0)
                row = {
                    "seconds": round(elapsed, 1),
                    "steps": steps,
                    "tokens": tokens,
                    "loss": round(sum(window) / len(window), 4),
                    "heldout": round(sum(loss for loss, _ in found) / len(found), 4),
                    "min_share": [round(float(layer.min()), 4) for layer in shares],
                    "max_share": [round(float(layer.max()), 4) for layer in shares],
                }
                window = []
                print(json.dumps(row), file=curve, flush=True)
                print(json.dumps(row), flush=True)
    save_model(model, tokenizer, args.out / "model")
    saved_model = AutoModelForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)
    print(report({split.domain: measure(saved_model, tokenizer, split.heldout) for split in splits}), flush=True)


if __name__ == "__main__":
    main()
