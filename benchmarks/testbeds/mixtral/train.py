"""Train the testbed: a dense phase, upcycling to a mixture of experts, then the rest of a time budget.

    python -m benchmarks.testbeds.mixtral.train --minutes 80 --work-dir WORK --out benchmarks/testbeds/mixtral

The schedule follows elapsed time, not steps, so a busy machine shortens the run and not its decay.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.testbeds.corpus import HERE
from benchmarks.testbeds.mixtral.data import WindowSampler, load_streams
from benchmarks.testbeds.mixtral.run_state import Run, learning_rate, save_model
from benchmarks.testbeds.routing import measure, report


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--minutes", type=float, default=80, help="time budget for training, start-up not counted")
    add("--work-dir", type=Path, required=True, help="folder for the token cache and the resumable checkpoint")
    add("--out", type=Path, required=True, help="folder for curve.jsonl and model/")
    add("--snapshot", type=Path, help="folder to refresh with a snapshot in the final format at each save")
    add("--resume", action="store_true", help="go on from the checkpoint in the work folder")
    add("--corpus", type=Path, default=HERE / "corpus", help="folder of *.txt.xz files")
    add("--experts", type=int, default=8, help="experts a layer")
    add("--top-k", type=int, default=2, help="experts a token")
    add("--width", type=int, default=240, help="neurons of one expert")
    add("--vocab-size", type=int, default=4096, help="tokens in the vocabulary")
    add("--dense-share", type=float, default=0.25, help="share of the budget for the dense phase")
    add("--reinit", type=float, default=0.5, help="share of each expert's neurons redrawn at upcycling")
    add("--seq-len", type=int, default=256, help="tokens a sequence")
    add("--long-seq-len", type=int, default=512, help="tokens a sequence at the end of the budget")
    add("--long-share", type=float, default=0.15, help="share of the budget with long sequences")
    add("--batch-tokens", type=int, default=3072, help="tokens a step")
    add("--cap-tokens", type=int, default=1_500_000, help="largest size a domain is drawn in proportion to")
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--decay-share", type=float, default=0.4, help="share of the budget over which the rate falls to zero")
    add("--warmup-share", type=float, default=0.01, help="share of the budget for a warm-up, in each phase")
    add("--weight-decay", type=float, default=0.1, help="on matrices only")
    add("--balance", type=float, default=0.1, help="coefficient of the per-layer load-balancing loss")
    add("--z-loss", type=float, default=1e-3, help="coefficient of the router z-loss")
    add("--log-steps", type=int, default=25, help="steps a row of the curve averages")
    add("--save-minutes", type=float, default=5, help="time between checkpoints")
    add("--experts-impl", default="sorted", help="experts implementation: sorted, or one of transformers'")
    add("--seed", type=int, default=0)
    return parser.parse_args()


def train(run: Run, args: argparse.Namespace) -> None:
    """Spend the time budget, logging to ``curve.jsonl`` and saving now and then."""
    streams = load_streams(run.splits, run.tokenizer, args.work_dir / "tokens.npz")
    sizes = {name: len(stream) for name, stream in streams.items()}
    print(f"training tokens: {sum(sizes.values())} {sizes}", flush=True)
    sampler = WindowSampler(streams, args.cap_tokens, run.tokenizer.bos_token_id, args.seed + run.steps)
    budget = 60 * args.minutes
    began = time.monotonic() - run.elapsed
    saved = run.elapsed
    losses: list[float] = []
    shares: list[torch.Tensor] = []
    with (args.out / "curve.jsonl").open("a" if args.resume else "w") as curve:
        while (progress := run.elapsed / budget) < 1:
            if run.experts == 1 and progress >= args.dense_share:
                run.save()
                run.start_mixture(progress)
                losses, shares = [], []
            length = args.seq_len if progress < 1 - args.long_share else args.long_seq_len
            rate = learning_rate(args, progress, run.phase_start)
            loss, step_shares = run.step(sampler.batch(args.batch_tokens // length, length), rate)
            losses.append(loss)
            shares.append(step_shares)
            run.elapsed = time.monotonic() - began
            save_now = run.elapsed - saved >= 60 * args.save_minutes
            if len(losses) == args.log_steps or save_now:
                mean_shares = torch.stack(shares).mean(dim=0)
                row = {
                    "seconds": round(run.elapsed, 1),
                    "steps": run.steps,
                    "tokens": run.tokens,
                    "experts": run.experts,
                    "lr": round(rate, 7),
                    "loss": round(sum(losses) / len(losses), 4),
                    "min_share": [round(layer.min().item(), 4) for layer in mean_shares],
                    "max_share": [round(layer.max().item(), 4) for layer in mean_shares],
                }
                if save_now:
                    run.save()
                    row["heldout"] = round(run.heldout(), 4)
                    saved = run.elapsed = time.monotonic() - began
                print(json.dumps(row), file=curve, flush=True)
                print(json.dumps(row), flush=True)
                losses, shares = [], []


def main() -> None:
    """Train, write the checkpoint, and report on it as it loads."""
    args = parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    run = Run(args)
    if args.snapshot and not args.resume:
        run.save()
    train(run, args)
    run.save()
    folder = args.out / "model"
    save_model(run.model, run.tokenizer, folder)
    print(f"steps {run.steps}, tokens {run.tokens}, seconds {run.elapsed:.0f}; wrote {folder}", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        texts = {split.domain: split.heldout for split in run.splits}
        print(f"whole held-out slices, bfloat16 weights computed in {dtype}:")
        print(report({name: measure(model, tokenizer, text) for name, text in texts.items()}), flush=True)


if __name__ == "__main__":
    main()
