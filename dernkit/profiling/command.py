"""What `dernkit profile` does: open, calibrate once, sweep, and put it into words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import torch

from dernkit import listing
from dernkit.errors import RecipeError
from dernkit.models.architecture import use_architecture
from dernkit.models.device import CPU
from dernkit.models.source import open_source
from dernkit.parts import Parts
from dernkit.profiling import words
from dernkit.profiling.curve import load_curves
from dernkit.profiling.sweep import check, ratios, statistics, sweep
from dernkit.progress import Progress
from dernkit.recipe import Keep, Recipe
from dernkit.registry import Registry


def profile(
    recipe: Recipe,
    model: str,
    path: Path,
    registry: Registry,
    progress: Progress,
    *,
    keeps: Sequence[int | float] = (),
    given: Path | None = None,
    rise: float = 0.05,
    trust_remote_code: bool = False,
    device: torch.device = CPU,
) -> dict[str, Any]:
    """Layer errors and expected rises of the loss for a sweep of ratios, from one calibration.

    Args:
        recipe: bound; its ``plan.keep`` is not used.
        model: the name that the user gave.
        path: the model's directory.
        registry: where the recipe's components come from.
        progress: where to report.
        keeps: fractions and counts; all that the routers allow, thinned, if there are none.
        given: the `stats.safetensors` of a run with this model, used instead of calibrating.
        rise: budget in nats per token.
        trust_remote_code: whether code that comes with the model may run.
        device: where layers run and are compressed.

    Raises:
        DernkitError: with one sentence.
    """
    with registry.naming_plugins():
        parts = Parts(recipe, registry, use_architecture(path, registry.components("architecture")))
        source = open_source(path, parts.adapters(), trust_remote_code=trust_remote_code, device=device)
        keeps = keeps or ratios(source, recipe.plan.groups)
        check(source, recipe, keeps)
        again = f"dernkit profile {recipe.path or 'RECIPE'} --model {model}"
        stats = statistics(source, recipe, given, parts.readers(), again, progress)
        found = sweep(source, recipe, keeps, stats, progress)
    layers = [block.layer for block in source.outline[1]]
    told = words.facts(found, layers, source.checkpoint.tensor_bytes, load_curves(), rise)
    tokens = next(iter(stats.values())).tokens
    return {"dernkit": 1, "model": model, "tokens": tokens, "recipe": recipe.resolved(), **told}


def parse_keeps(text: str | None) -> list[int | float]:
    """Ratios that were given with commas between them; none if there are none.

    Raises:
        RecipeError: one is neither a fraction nor a count.
    """
    found: list[int | float] = []
    for word in [] if text is None else text.split(","):
        try:
            found.append(Keep().parse(json.loads(word), Path()))
        except ValueError:
            raise RecipeError(
                f"--keep: must be fractions above 0 up to 1.0 or counts of at least 1, with commas between them. "
                f"Got '{word}' instead. Write 0.75,0.5 or 6,4."
            ) from None
    return found


def show(told: dict[str, Any]) -> None:
    """The table and the sentence."""
    listing.table(words.header(told), words.lines(told))
    click.echo(told["sentence"])


def save(told: dict[str, Any], file: Path) -> None:
    """As JSON, renamed when complete.

    Raises:
        RecipeError: nothing can be written there.
    """
    partial = file.with_name(file.name + ".partial")
    try:
        partial.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        partial.replace(file)
    except OSError as error:
        raise RecipeError(
            f"--out: must be a file that can be written. Got '{file}' ({error.strerror}) instead. Choose another one."
        ) from error
