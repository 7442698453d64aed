"""Measurements on text files: how well a model predicts them, and how near it stays to the original."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, final

import numpy as np
import torch
from annotated_types import Interval
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from dernkit.api import CheckpointError, Observations, Subject, hookimpl
from dernkit.builtin.texts import CONTEXT, Part, Window, batches, read_domains, stacked, windows

ENTRIES = 1 << 22
"""Logits of a model that are in float64 at a time: 27 tokens of a vocabulary of 150,000."""


@final
@dataclass(frozen=True)
class Perplexity:
    """Loss per token, perplexity and bits per byte on a text file, or on every ``*.txt`` of a folder (one a domain)."""

    name: ClassVar[str] = "perplexity"

    path: Path
    """A UTF-8 text file, or a folder of them; the file's stem is the domain's name."""
    length: Annotated[int, Interval(ge=2, le=1_048_576)] = 1024
    """Tokens in a window."""
    stride: Annotated[int, Interval(ge=1, le=1_048_576)] | None = None
    """Tokens between the starts of two windows; the overlap is context and is not scored.

    By default ``length - 1``: every token is scored once.
    """
    batch_size: Annotated[int, Interval(ge=1, le=4096)] = 8
    """Windows in one forward pass."""
    limit: Annotated[int, Interval(ge=2, le=1_000_000_000)] | None = None
    """Read only so many bytes of each text."""
    skip: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """Leave out so many bytes at the beginning of each text: what options were chosen on, say."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        """Per domain: ``loss`` (nats per scored token), ``perplexity``, ``bits_per_byte``, ``tokens``; and means."""
        results: dict[str, float] = {}
        losses = []
        for domain in read_domains(subject, self.path, Part(self.skip, self.limit), self.name):
            found = list(self._scored(subject, windows(domain, self.length, self.stride)))
            tokens = sum(window.scored for window, _ in found)
            loss = sum(nats for _, nats in found) / tokens
            losses.append(loss)
            results |= {
                f"{domain.name}/loss": loss,
                f"{domain.name}/perplexity": _exp(loss),
                f"{domain.name}/bits_per_byte": loss * tokens / math.log(2) / domain.bytes,
                f"{domain.name}/tokens": tokens,
            }
        mean = sum(losses) / len(losses)
        return results | {"mean/loss": mean, "mean/perplexity": _exp(mean)}

    def observe(self, subject: Subject) -> Mapping[str, Observations]:
        """For each window: ``bits_per_byte`` (bits, weighed by bytes) and ``loss`` (nats, weighed by tokens)."""
        domains = read_domains(subject, self.path, Part(self.skip, self.limit), self.name)
        found = [
            pair for domain in domains for pair in self._scored(subject, windows(domain, self.length, self.stride))
        ]
        seen = [window for window, _ in found]
        nats = np.array([value for _, value in found])
        return {
            "bits_per_byte": _observed(seen, nats / math.log(2), np.array([window.bytes for window in seen])),
            "loss": _observed(seen, nats, np.array([float(window.scored) for window in seen])),
        }

    def _scored(self, subject: Subject, found: Sequence[Window]) -> Iterator[tuple[Window, float]]:
        """Windows, each with its summed loss in nats."""
        for batch in batches(found, self.batch_size):
            for window, logits in zip(batch, _logits(subject, batch), strict=True):
                # Not the model's own loss: some families add their load-balancing loss to it.
                yield window, _finite(_nats(logits, window.labels), "loss", subject, window)


@final
@dataclass(frozen=True)
class Fidelity:
    """How near a compressed model's predictions on text are to the original's: divergence, and agreement.

    Both models are in memory. Of the original itself the answer is known: 0 and 1.
    """

    name: ClassVar[str] = "fidelity"

    path: Path
    """A UTF-8 text file, or a folder of ``*.txt``; the file's stem is the domain's name."""
    length: Annotated[int, Interval(ge=2, le=1_048_576)] = 1024
    """Tokens in a window."""
    stride: Annotated[int, Interval(ge=1, le=1_048_576)] | None = None
    """Tokens between the starts of two windows; the overlap is context and is not compared.

    By default ``length - 1``: the predictions of every token are compared once.
    """
    batch_size: Annotated[int, Interval(ge=1, le=4096)] = 8
    """Windows in one forward pass."""
    limit: Annotated[int, Interval(ge=2, le=1_000_000_000)] | None = None
    """Read only so many bytes of each text."""
    skip: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """Leave out so many bytes at the beginning of each text: what options were chosen on, say."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        """Per domain and as the mean of the domains: ``kl`` (nats per token), ``top1`` (share of tokens)."""
        found = self.observe(subject)
        results: dict[str, float] = {}
        for domain in found["kl"].by_group():
            results |= {f"{domain}/{metric}": seen.by_group()[domain] for metric, seen in found.items()}
        return results | {f"mean/{metric}": seen.mean() for metric, seen in found.items()}

    def observe(self, subject: Subject) -> Mapping[str, Observations]:
        """For each window, weighed by tokens: ``kl``, the sum of KL(original || compressed) in nats over the tokens,
        and ``top1``, at how many of them both models have the same most likely token."""
        domains = read_domains(subject, self.path, Part(self.skip, self.limit), self.name)
        seen = [window for domain in domains for window in windows(domain, self.length, self.stride)]
        tokens = np.array([float(window.scored) for window in seen])
        kl, same = np.zeros(len(seen)), tokens
        if subject.original is not None:
            found = {window.name: values for window, values in self._compared(subject, subject.original(), seen)}
            kl, same = np.array([found[window.name] for window in seen]).T
        return {"kl": _observed(seen, kl, tokens), "top1": _observed(seen, same, tokens, higher_is_better=True)}

    def _compared(
        self, subject: Subject, original: Subject, found: Sequence[Window]
    ) -> Iterator[tuple[Window, tuple[float, float]]]:
        """Windows, each with its summed divergence and the number of tokens on which both agree."""
        for batch in batches(found, self.batch_size):
            for window, before, after in zip(batch, _logits(original, batch), _logits(subject, batch), strict=True):
                if before.shape != after.shape:
                    raise CheckpointError(
                        f"{subject.path}: must have the original's vocabulary of {before.shape[1]} tokens. "
                        f"Got {after.shape[1]} instead. Compare it with the model that it was made from."
                    )
                kl, same = divergence(before, after, window.labels)
                yield window, (_finite(kl, "divergence", subject, window), float(same))


def divergence(
    original: Float[Tensor, "tokens vocabulary"],
    compressed: Float[Tensor, "tokens vocabulary"],
    labels: Int64[Tensor, " tokens"],
) -> tuple[float, int]:
    """Sum over the scored tokens of Σ_v p(v) (log p(v) − log q(v)) in nats, and how many have the same argmax.

    In float64, a few tokens at a time; a token that the original never predicts (−inf) adds 0.
    """
    total, same = 0.0, 0
    places = (labels[1:] != CONTEXT).nonzero()[:, 0].to(original.device)  # the logits at t are about the token at t + 1
    for some in places.split(max(1, ENTRIES // original.shape[1])):
        p, q = (log_softmax(logits[some].double(), dim=-1) for logits in (original, compressed))
        possible: Bool[Tensor, "some vocabulary"] = p > -math.inf
        each = torch.where(possible, p.exp() * (p - q), 0.0).sum(dim=-1)
        total += float(each.clamp(min=0).sum())  # below 0 by rounding only
        same += int((original[some].argmax(dim=-1) == compressed[some].argmax(dim=-1)).sum())
    return total, same


def _logits(subject: Subject, batch: Sequence[Window]) -> Float[Tensor, "windows tokens vocabulary"]:
    with torch.no_grad():
        return subject.model(input_ids=stacked(batch).to(subject.model.device), use_cache=False).logits


def _nats(logits: Float[Tensor, "tokens vocabulary"], labels: Int64[Tensor, " tokens"]) -> float:
    """Summed loss of one window."""
    losses = cross_entropy(logits[:-1].float(), labels[1:].to(logits.device), ignore_index=CONTEXT, reduction="none")
    return float(losses.double().sum())


def _observed(
    seen: Sequence[Window], values: np.ndarray, weights: np.ndarray, *, higher_is_better: bool = False
) -> Observations:
    names, groups = tuple(window.name for window in seen), tuple(window.domain for window in seen)
    return Observations(names, groups, values, weights, higher_is_better)


def _finite(value: float, what: str, subject: Subject, window: Window) -> float:
    if not math.isfinite(value):
        raise CheckpointError(
            f"{subject.path}: the model must give finite numbers. Got a {what} of {value} on window "
            f"'{window.name}' instead. Look at its weights, or keep them in a wider dtype."
        )
    return value


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


@hookimpl
def dernkit_evaluators() -> list[type]:
    """The evaluators that read text files."""
    return [Perplexity, Fidelity]
