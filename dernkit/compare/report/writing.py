"""The files of a report."""

from __future__ import annotations

from pathlib import Path

from dernkit.compare.report.drawing import available
from dernkit.compare.report.inputs import read
from dernkit.compare.report.markdown import PLOTS, markdown
from dernkit.compare.report.page import page
from dernkit.compare.report.sections import sections
from dernkit.compare.report.words import counted

HTML, MARKDOWN = "report.html", "report.md"


def write_report(out: Path, *, metric: str, baseline: str) -> list[Path]:
    """Write what the results in ``out`` say; the same results give the same bytes.

    Args:
        out: where a comparison left ``results.parquet``, and ``stability.json`` if it looked at that.
        metric: ``evaluator/metric`` that recipes are compared by.
        baseline: recipe that the others are compared with.

    Returns:
        the page, the Markdown, and its figures.

    Raises:
        CheckpointError: ``out`` holds no results, or such that cannot be compared.
        RecipeError: the metric or the baseline is not among them, or a package is missing.
    """
    available()
    results = read(out, metric=metric, baseline=baseline)
    parts = sections(results)
    title = f"{counted(len(results.recipes), 'recipe')} on {', '.join(results.models)}"
    sentence = results.analysis.sentence
    pictures = {f"{picture.name}.svg": picture for part in parts for picture in part.pictures}
    plots = out / PLOTS
    plots.mkdir(exist_ok=True)
    for old in plots.glob("*.svg"):
        if old.name not in pictures:
            old.unlink()
    written = [_write(plots / name, picture.file()) for name, picture in sorted(pictures.items())]
    # The documents last: what they show is there.
    documents = ((MARKDOWN, markdown(title, sentence, parts)), (HTML, page(title, sentence, parts)))
    return [*(_write(out / name, text) for name, text in documents), *written]


def _write(file: Path, text: str) -> Path:
    """Renamed when complete."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)
    return file
