"""The state of a testbed training run: schedule, optimizer, steps, checkpoints and snapshots."""

import argparse
import copy
import json
import shutil
from pathlib import Path

import torch
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from benchmarks.testbeds.corpus import load_splits
from benchmarks.testbeds.mixtral.data import train_tokenizer
from benchmarks.testbeds.mixtral.recipe import (
    build,
    hidden_and_router,
    model_config,
    routing_losses,
    token_loss,
    upcycle,
)
from benchmarks.testbeds.routing import measure


def learning_rate(args: argparse.Namespace, progress: float, phase_start: float) -> float:
    """Linear warm-up within a phase, a constant, then a linear decay to zero at the end of the budget."""
    warm = min(1.0, (progress - phase_start) / args.warmup_share + 0.01)
    left = min(1.0, max(0.0, 1 - progress) / args.decay_share)
    return args.lr * warm * left


def make_optimizer(model: MixtralForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), weight_decay=args.weight_decay, fused=True)


def save_model(model: MixtralForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the bfloat16 checkpoint beside `folder`, then put it in its place."""
    fresh = folder.with_name(folder.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    add_older_spellings(fresh)
    (fresh / "model.safetensors").chmod(0o644)
    shutil.rmtree(folder, ignore_errors=True)
    fresh.rename(folder)


def add_older_spellings(folder: Path) -> None:
    """Let software that knows no transformers 5 read the model: without the old rope_theta, mlx-lm takes another."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config |= {"rope_theta": config["rope_parameters"]["rope_theta"], "torch_dtype": config["dtype"]}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    file = folder / "tokenizer_config.json"
    file.write_text(file.read_text().replace('"TokenizersBackend"', '"PreTrainedTokenizerFast"'))


class Run:
    """The state of a training run: model, optimizer, phase, and the time and tokens spent."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.splits = load_splits(args.corpus)
        args.work_dir.mkdir(parents=True, exist_ok=True)
        folder = args.work_dir / "tokenizer"
        if not folder.exists():
            train_tokenizer(self.splits, args.vocab_size).save_pretrained(folder)
        self.tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
        torch.manual_seed(args.seed)
        self.experts, self.elapsed, self.tokens, self.steps, self.phase_start = 1, 0.0, 0, 0, 0.0
        if args.resume:
            state = torch.load(args.work_dir / "state.pt", weights_only=True)
            self.experts, self.elapsed, self.tokens, self.steps, self.phase_start = state["progress"]
        self.model = self.prepare(build(self.config(self.experts)))
        self.optimizer = make_optimizer(self.model, args)
        if args.resume:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])

    def config(self, experts: int) -> MixtralConfig:
        """The configuration for a phase: one expert is the dense model."""
        return model_config(experts, min(experts, self.args.top_k), self.args.width, self.args.vocab_size)

    def prepare(self, model: MixtralForCausalLM) -> MixtralForCausalLM:
        """Set the experts implementation and training mode."""
        model.set_experts_implementation(self.args.experts_impl)
        return model.train()

    def mixture(self) -> MixtralForCausalLM:
        """The model, upcycled if it is still dense."""
        if self.experts > 1:
            return self.model
        return upcycle(self.model, self.args.experts, self.args.top_k, self.args.reinit, self.args.seed)

    def start_mixture(self, progress: float) -> None:
        """Leave the dense phase."""
        self.model, self.experts, self.phase_start = self.prepare(self.mixture()), self.args.experts, progress
        self.optimizer = make_optimizer(self.model, self.args)

    def step(self, batch: torch.Tensor, rate: float) -> tuple[float, torch.Tensor]:
        """One update; returns the loss and each layer's expert shares."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        hidden, router = hidden_and_router(self.model, batch[:, :-1])
        loss = token_loss(self.model, hidden, batch[:, 1:])
        balance, squares, shares = routing_losses(router, self.model.config.num_experts_per_tok)
        (loss + self.args.balance * balance + self.args.z_loss * squares).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.tokens += batch[:, 1:].numel()
        self.steps += 1
        return loss.item(), shares

    def heldout(self, limit_windows: int | None = 6) -> float:
        """Mean over domains of the held-out loss, on the beginning of each domain's slice."""
        texts = [split.heldout[:40_000] for split in self.splits]
        losses = [measure(self.model, self.tokenizer, text, limit_windows=limit_windows).loss for text in texts]
        return sum(losses) / len(losses)

    def save(self) -> None:
        """Write the resumable checkpoint and the snapshot."""
        progress = (self.experts, self.elapsed, self.tokens, self.steps, self.phase_start)
        state = {"progress": progress, "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.args.work_dir / "state.new")
        (self.args.work_dir / "state.new").replace(self.args.work_dir / "state.pt")
        if self.args.snapshot:
            save_model(self.mixture(), self.tokenizer, self.args.snapshot)
