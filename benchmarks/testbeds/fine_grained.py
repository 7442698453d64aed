"""Train a testbed of many small experts from scratch: Qwen2-MoE or DeepSeek-V2 layers, with shared experts.

    python -m benchmarks.testbeds.fine_grained qwen2-moe --tokens 7e6 --work-dir WORK --out OUT

Unlike the Mixtral testbed there is no dense phase: the experts have no common ancestor. Data, tokenizer, optimizer and
the losses on routing are those of `benchmarks.testbeds.mixtral`; the schedule follows the tokens, and the same command
goes on where a killed one was.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
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


class Run:
    """The state of a training run: model, optimizer, and the tokens and seconds spent."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        args.out.mkdir(parents=True, exist_ok=True)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        self.splits = load_splits(args.corpus)
        self.tokenizer = train_tokenizer(self.splits, VOCABULARY)
        streams = load_streams(self.splits, self.tokenizer, args.work_dir / "tokens.npz")
        self.sampler = WindowSampler(streams, args.cap_tokens, self.tokenizer.bos_token_id, args.seed)
        self.model = build(args.testbed, args.seed)
        self.optimizer = make_optimizer(self.model, args)
        self.steps, self.tokens, self.seconds = 0, 0, 0.0
        self.losses: list[float] = []
        if self._state.exists():
            state = torch.load(self._state, weights_only=True)
            self.steps, self.tokens, self.seconds = state["progress"]
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    @property
    def _state(self) -> Path:
        return self.args.work_dir / f"{self.args.testbed}.pt"

    def step(self) -> None:
        """One update; which windows it sees depends on seed and step alone."""
        args = self.args
        self.sampler.rng = np.random.default_rng([args.seed, self.steps])
        batch = self.sampler.batch(args.batch_tokens // args.seq_len, args.seq_len)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(args, self.tokens / args.tokens, 0.0)
        with router_logits(self.model) as logits:
            hidden = self.model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        loss = token_loss(self.model, hidden, batch[:, 1:])
        balance, squares, _ = routing_losses(tuple(logits), self.model.config.num_experts_per_tok)
        (loss + args.balance * balance + args.z_loss * squares).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps, self.tokens = self.steps + 1, self.tokens + batch[:, 1:].numel()
        self.losses.append(loss.item())

    def save(self) -> None:
        """Write what is needed to go on, the model as it is, and a row of the curve."""
        progress = (self.steps, self.tokens, self.seconds)
        state = {"progress": progress, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        partial = self._state.with_suffix(".new")
        torch.save(state, partial)
        partial.replace(self._state)
        save_model(self.model, self.tokenizer, self.args.out / "model")
        found = [measure(self.model, self.tokenizer, split.heldout[:40_000], limit_windows=6) for split in self.splits]
        shares = sum(found[1:], found[0]).shares
        row = {
            "seconds": round(self.seconds, 1),
            "steps": self.steps,
            "tokens": self.tokens,
            "loss": round(sum(self.losses) / len(self.losses), 4),
            "heldout": round(sum(each.loss for each in found) / len(found), 4),
            "min_share": [round(float(layer.min()), 4) for layer in shares],
            "max_share": [round(float(layer.max()), 4) for layer in shares],
        }
        self.losses = []
        with (self.args.out / "curve.jsonl").open("a") as curve:
            print(json.dumps(row), file=curve)
        print(json.dumps(row), flush=True)

    def train(self) -> None:
        """Spend the budget."""
        saved = self.seconds
        while self.tokens < self.args.tokens:
            began = time.monotonic()
            self.step()
            self.seconds += time.monotonic() - began
            if self.seconds - saved >= 60 * self.args.save_minutes or self.tokens >= self.args.tokens:
                saved = self.seconds
                self.save()


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("testbed", choices=list(TESTBEDS))
    add = parser.add_argument
    add("--tokens", type=float, default=7e6, help="budget")
    add("--work-dir", type=Path, required=True, help="folder for the token cache and what is needed to go on")
    add("--out", type=Path, required=True, help="folder for model/, curve.jsonl and routing.md")
    add("--corpus", type=Path, default=HERE / "corpus", help="folder of *.txt.xz files")
    add("--seq-len", type=int, default=256, help="tokens a sequence")
    add("--batch-tokens", type=int, default=2048, help="tokens a step")
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
    """Train to the end of the budget, then write loss and routing on all held-out text to ``routing.md``."""
    args = parse_args()
    run = Run(args)
    print(f"{sum(p.numel() for p in run.model.parameters()):,} parameters, {run.tokens:,} tokens done", flush=True)
    run.train()
    saved = AutoModelForCausalLM.from_pretrained(args.out / "model", dtype=torch.float32)
    tables = report({split.domain: measure(saved, run.tokenizer, split.heldout) for split in run.splits})
    (args.out / "routing.md").write_text(tables + "\n", encoding="utf-8")
    print(tables, flush=True)


if __name__ == "__main__":
    main()
