"""Runs in the environment of transformers 4: writes checkpoints as they were published, reads results, and turns them
into GGUF files with llama.cpp's converter, which needs torch and transformers too.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any
from unittest.mock import patch

import convert_hf_to_gguf
import numpy as np
import torch
import transformers
from answering import answer
from conversion.base import TextModel

transformers.logging.set_verbosity_error()
torch.set_num_threads(1)


def version() -> str:
    """The version of this client."""
    return f"transformers {installed('transformers')}"


def save(folder: str, config: str, model: str, fields: dict[str, Any]) -> None:
    """Write a random model of this version's own classes; its config has the field names of the hub."""
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**fields)).eval()
    rng = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in (*made.named_parameters(), *made.named_buffers()):
            if name.endswith("correction_bias"):
                tensor.copy_(0.05 * torch.randn(tensor.shape, generator=rng))
            elif tensor.ndim > 1:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=rng))
    made.save_pretrained(folder)
    file = Path(folder) / "config.json"  # "dtype" is newer than most published configs
    file.write_text(file.read_text().replace('"dtype":', '"torch_dtype":'))


def logits(folder: str, ids: list[list[int]], out: str) -> dict[str, list[str]]:
    """Write the logits of a checkpoint in float32; returns the tensors that did not fit."""
    architecture = json.loads((Path(folder) / "config.json").read_text())["architectures"][0]
    load = getattr(transformers, architecture).from_pretrained
    model, info = load(folder, dtype=torch.float32, output_loading_info=True)
    with torch.no_grad():
        np.save(out, model.eval()(torch.tensor(ids)).logits.numpy())
    return {name: sorted(map(str, keys)) for name, keys in info.items() if keys}


def to_gguf(folder: str, out: str) -> None:
    """Convert a checkpoint with the bundled model's tokenizer to float32.

    The converter knows published tokenizers by a hash over their vocabulary and wants to be told how any other one
    splits text; the bundled model's does it as GPT-2's. The tests give token ids and never split text.
    """
    arguments = ["convert-hf-to-gguf", "--outtype", "f32", "--outfile", out, folder]
    with (
        patch.object(TextModel, "get_vocab_base_pre", lambda self, tokenizer: "gpt-2"),
        patch.object(sys, "argv", arguments),
    ):
        convert_hf_to_gguf.main()


if __name__ == "__main__":
    answer(version=version, save=save, logits=logits, to_gguf=to_gguf)
