"""Tokenizer and token batches for training the testbed."""

from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from benchmarks.testbeds.corpus import Split, chunks

SPECIAL = ("<pad>", "<bos>", "<eos>")
ENCODE_CHARS = 50_000


def train_tokenizer(splits: list[Split], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer learned on the training text only; it puts ``<bos>`` before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    texts = (piece for split in splits for piece in chunks(split.train, ENCODE_CHARS))
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> np.ndarray:
    """The token ids of a long text, without special tokens."""
    backend = tokenizer.backend_tokenizer
    parts = backend.encode_batch(chunks(text, ENCODE_CHARS), add_special_tokens=False)
    return np.concatenate([np.asarray(part.ids, dtype=np.uint16) for part in parts])


class WindowSampler:
    """Random training windows, a domain drawn in proportion to its size up to a cap.

    Half of the windows begin with ``<bos>`` in place of their first token, so that the model serves with and
    without it.
    """

    def __init__(self, streams: dict[str, np.ndarray], cap_tokens: int, bos_id: int, seed: int):
        self.streams = [streams[name] for name in sorted(streams)]
        weights = np.array([min(len(stream), cap_tokens) for stream in self.streams], dtype=np.float64)
        self.shares = weights / weights.sum()
        self.bos_id = bos_id
        self.rng = np.random.default_rng(seed)

    def batch(self, sequences: int, length: int) -> torch.Tensor:
        """`sequences` windows of `length` + 1 tokens: inputs and, shifted by one, targets."""
        windows = []
        for domain in self.rng.choice(len(self.streams), size=sequences, p=self.shares):
            stream = self.streams[domain]
            start = int(self.rng.integers(len(stream) - length))
            window = stream[start : start + length + 1].astype(np.int64)
            if self.rng.random() < 0.5:
                window[0] = self.bos_id
            windows.append(window)
        return torch.from_numpy(np.stack(windows))


def load_streams(splits: list[Split], tokenizer: PreTrainedTokenizerFast, cache: Path | None) -> dict[str, np.ndarray]:
    """Each domain's training tokens, kept in the file `cache` between runs."""
    if cache is not None and cache.exists():
        with np.load(cache) as stored:
            return {name: stored[name] for name in stored.files}
    streams = {split.domain: encode(tokenizer, split.train) for split in splits}
    if cache is not None:
        np.savez(cache, **streams)
    return streams
