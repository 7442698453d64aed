"""The report as one HTML file that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import metadata, resources

from dernkit.compare.report.sections import Section


def page(title: str, sentence: str, parts: Sequence[Section]) -> str:
    """The whole page; every text is escaped, and only drawn figures go in as they are."""
    from jinja2 import Environment, StrictUndefined

    files = resources.files(__package__ or "dernkit.compare.report")
    environment = Environment(autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    template = environment.from_string(files.joinpath("page.html.jinja").read_text("utf-8"))
    style = files.joinpath("page.css").read_text("utf-8").rstrip()
    return template.render(
        title=title, sentence=sentence, sections=parts, style=style, version=metadata.version("dernkit")
    )
