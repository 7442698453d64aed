"""Measurements of what a model writes: greedy continuations against the original's, and how they repeat themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, final

import numpy as np
import torch
from annotated_types import Interval
from jaxtyping import Int64
from torch import Tensor

from dernkit.api import Observations, RecipeError, Subject, hookimpl
from dernkit.builtin.texts import Domain, Part, read_domains

GRAM = 4


@final
@dataclass(frozen=True)
class Generation:
    """Greedy continuations of prompts cut from text files: agreement with the original's, repetition, variety.

    The most likely token is taken again and again, whatever the model's own generation settings are; an
    end-of-sequence token does not end a continuation.
    """

    name: ClassVar[str] = "generation"

    path: Path
    """A UTF-8 text file, or a folder of ``*.txt``; the file's stem is the domain's name."""
    prompts: Annotated[int, Interval(ge=1, le=10_000)] = 16
    """Prompts of each file, their starts spread evenly over it."""
    prompt_length: Annotated[int, Interval(ge=1, le=65_536)] = 64
    """Tokens of a prompt."""
    new_tokens: Annotated[int, Interval(ge=GRAM, le=65_536)] = 32
    """Tokens of a continuation."""
    batch_size: Annotated[int, Interval(ge=1, le=4096)] = 8
    """Prompts that are continued at a time."""
    limit: Annotated[int, Interval(ge=2, le=1_000_000_000)] | None = None
    """Read only so many bytes of each text."""
    skip: Annotated[int, Interval(ge=0, le=1_000_000_000)] = 0
    """Leave out so many bytes at the beginning of each text."""

    def evaluate(self, subject: Subject) -> Mapping[str, float]:
        """Per domain and as the mean of the domains: ``agreement``, ``repetition``, ``distinct``, from 0 to 1."""
        found = self.observe(subject)
        results: dict[str, float] = {}
        for domain in found["agreement"].by_group():
            results |= {f"{domain}/{metric}": seen.by_group()[domain] for metric, seen in found.items()}
        return results | {f"mean/{metric}": seen.mean() for metric, seen in found.items()}

    def observe(self, subject: Subject) -> Mapping[str, Observations]:
        """For each continuation of N tokens: ``agreement``, how many of them come before the first one that differs
        from the original's continuation, of N; ``repetition``, how many of its 4-grams occurred in it before, of
        N − 3; ``distinct``, how many different tokens it has, of N."""
        domains = list(read_domains(subject, self.path, Part(self.skip, self.limit), self.name))
        prompts = torch.stack([prompt for domain in domains for prompt in self._prompts(domain)])
        names = tuple(f"{domain.name}:{number}" for domain in domains for number in range(self.prompts))
        groups = tuple(domain.name for domain in domains for _ in range(self.prompts))
        written = self._continued(subject, prompts)
        original = written if subject.original is None else self._continued(subject.original(), prompts)

        def shares(values: Sequence[int], of: int, *, higher_is_better: bool = True) -> Observations:
            weights = np.full(len(names), float(of))
            return Observations(names, groups, np.array(values, dtype=np.float64), weights, higher_is_better)

        pairs = list(zip(written.tolist(), original.tolist(), strict=True))
        return {
            "agreement": shares([common_prefix(mine, theirs) for mine, theirs in pairs], self.new_tokens),
            "repetition": shares(
                [repetitions(mine) for mine, _ in pairs], self.new_tokens - GRAM + 1, higher_is_better=False
            ),
            "distinct": shares([len(set(mine)) for mine, _ in pairs], self.new_tokens),
        }

    def _prompts(self, domain: Domain) -> Iterator[Int64[Tensor, " prompt"]]:
        starts = len(domain.ids) - self.prompt_length + 1
        if starts < self.prompts:
            needed = self.prompt_length + self.prompts - 1
            raise RecipeError(
                f"generation.path: texts must have at least {needed} tokens for {self.prompts} prompts of "
                f"{self.prompt_length}. Got {len(domain.ids)} in '{domain.name}' instead. "
                "Ask for fewer or shorter ones."
            )
        for number in range(self.prompts):
            start = number * starts // self.prompts
            yield domain.ids[start : start + self.prompt_length]

    def _continued(self, subject: Subject, prompts: Int64[Tensor, "prompts prompt"]) -> Int64[Tensor, "prompts new"]:
        return torch.cat([_greedy(subject, some, self.new_tokens) for some in prompts.split(self.batch_size)])


def _greedy(subject: Subject, prompts: Int64[Tensor, "prompts prompt"], count: int) -> Int64[Tensor, "prompts new"]:
    """The most likely next token, ``count`` times; of equals the first."""
    found: list[Tensor] = []
    inputs, cache = prompts.to(subject.model.device), None
    with torch.no_grad():
        for _ in range(count):
            output = subject.model(input_ids=inputs, past_key_values=cache, use_cache=True)
            found.append(output.logits[:, -1].argmax(dim=-1))
            cache = output.past_key_values
            inputs = found[-1][:, None]
    return torch.stack(found, dim=1).cpu()


def common_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """How many tokens come before the first difference."""
    return next((place for place, (a, b) in enumerate(zip(first, second, strict=True)) if a != b), len(first))


def repetitions(tokens: Sequence[int]) -> int:
    """How many of the 4-grams occurred before."""
    grams = [tuple(tokens[at : at + GRAM]) for at in range(len(tokens) - GRAM + 1)]
    return len(grams) - len(set(grams))


@hookimpl
def dernkit_evaluators() -> list[type]:
    """The evaluator that lets a model write."""
    return [Generation]
