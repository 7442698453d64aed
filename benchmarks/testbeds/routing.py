"""Per-layer expert shares and per-domain loss of a testbed checkpoint.

python -m benchmarks.testbeds.routing MODEL_DIR --text FILE_OR_FOLDER [...]
"""

import argparse
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast


@contextmanager
def router_logits(model: PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """A list that every forward fills with the logits of each router, layer by layer."""
    seen: list[torch.Tensor] = []
    routers = [module for module in model.modules() if type(module).__name__.lower().endswith("topkrouter")]
    handles = [router.register_forward_hook(lambda _, args, output: seen.append(output[0])) for router in routers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Measurement:
    """Sums over one or more texts."""

    nats: float
    tokens: int
    utf8_bytes: int
    assignments: torch.Tensor  # (MoE layers, experts): how often each expert was chosen

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Bits a byte of UTF-8 text."""
        return self.nats / math.log(2) / self.utf8_bytes

    @property
    def shares(self) -> torch.Tensor:
        """Each layer's share of assignments by expert; a layer sums to 1."""
        return self.assignments / self.assignments.sum(dim=1, keepdim=True)

    def __add__(self, other: "Measurement") -> "Measurement":
        return Measurement(
            self.nats + other.nats,
            self.tokens + other.tokens,
            self.utf8_bytes + other.utf8_bytes,
            self.assignments + other.assignments,
        )


@torch.no_grad()
def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    seq_len: int = 256,
    batch: int = 8,
    limit_windows: int | None = None,
) -> Measurement:
    """Loss and routing on `text`, in windows that each begin with ``<bos>``, so every token is predicted."""
    was_training = model.training
    model.eval()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    windows = list(ids.split(seq_len - 1))[:limit_windows]
    counts: dict[int, torch.Tensor] = {}
    nats, tokens = 0.0, 0
    for start in range(0, len(windows), batch):
        group = windows[start : start + batch]
        for same in (group[:-1], group[-1:]):  # only the last window of a text can be shorter
            if not same:
                continue
            targets = torch.stack(same)
            inputs = functional.pad(targets, (1, 0), value=tokenizer.bos_token_id)[:, :-1]
            with router_logits(model) as routed:
                logits = model(input_ids=inputs, use_cache=False).logits.float()
            nats += functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum").item()
            tokens += targets.numel()
            for layer, router in enumerate(routed):
                chosen = router.flatten(0, -2).float().topk(model.config.num_experts_per_tok, dim=-1).indices
                found = torch.bincount(chosen.flatten(), minlength=router.shape[-1])
                counts[layer] = counts.get(layer, 0) + found
    model.train(was_training)
    kept = text if limit_windows is None else tokenizer.decode(torch.cat(windows))
    return Measurement(nats, tokens, len(kept.encode("utf-8")), torch.stack(list(counts.values())).float())


def text_files(paths: list[Path]) -> list[Path]:
    """The given files, and the ``*.txt`` files of the given folders."""
    return [file for path in paths for file in (sorted(path.glob("*.txt")) if path.is_dir() else [path])]


def report(results: dict[str, Measurement]) -> str:
    """A Markdown table of losses, and one of expert shares over all the texts together."""
    total = next(iter(results.values()))
    for result in list(results.values())[1:]:
        total = total + result
    lines = ["| text | tokens | nats/token | bits/byte |", "|---|---:|---:|---:|"]
    for name, result in [*results.items(), ("all", total)]:
        lines.append(f"| {name} | {result.tokens} | {result.loss:.3f} | {result.bits_per_byte:.3f} |")
    lines += ["", "| layer | min share | max share | shares by expert (%) |", "|---:|---:|---:|---|"]
    for layer, shares in enumerate(total.shares):
        listed = " ".join(f"{100 * share:.1f}" for share in shares.tolist())
        lines.append(f"| {layer} | {100 * shares.min():.1f}% | {100 * shares.max():.1f}% | {listed} |")
    return "\n".join(lines)


def main() -> None:
    """Print the two tables for the texts given."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="text files, or folders of *.txt")
    parser.add_argument("--seq-len", type=int, default=256, help="window length, <bos> included")
    parser.add_argument("--dtype", default="float32", help="computing type: float32 or bfloat16")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, args.dtype))
    results = {
        file.stem: measure(model, tokenizer, file.read_text(encoding="utf-8"), args.seq_len)
        for file in text_files(args.text)
    }
    print(report(results))


if __name__ == "__main__":
    main()
