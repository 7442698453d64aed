"""Held-out loss of a model, and how its tokens spread over the experts."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks.testbeds.routing import router_logits
from benchmarks.testbeds.smol.routing import shares


def windows(tokenizer: Any, text: str, length: int) -> Tensor:
    """The whole windows of `length` tokens in a text [b, length]."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return ids[: len(ids) // length * length].view(-1, length)


def heldout_windows(tokenizer: Any, folder: Path, length: int, count: int) -> dict[str, Tensor]:
    """The first `count` windows of every ``*.txt`` in a folder, by its stem."""
    return {
        file.stem: windows(tokenizer, file.read_text(encoding="utf-8"), length)[:count]
        for file in sorted(folder.glob("*.txt"))
    }


@torch.no_grad()
def losses(model: Any, texts: dict[str, Tensor]) -> dict[str, float]:
    """Nats a token for each text's windows; a window's first token is context only."""
    found = {}
    for name, ids in texts.items():
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        found[name] = float(cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten()))
    return found


@torch.no_grad()
def expert_shares(model: Any, texts: dict[str, Tensor]) -> Tensor:
    """The part of all tokens that choose each expert [layers, E]; a layer's sum to top-k."""
    seen: list[list[Tensor]] = []
    for ids in texts.values():
        with router_logits(model) as logits:
            model.model(input_ids=ids, use_cache=False)
        seen.append(logits)
    top_k = model.config.num_experts_per_tok
    return torch.stack([shares(torch.cat(layer).float(), top_k) for layer in zip(*seen, strict=True)])
