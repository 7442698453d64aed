"""The report as Markdown, with its figures as files beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from dernkit.compare.report.sections import Section
from dernkit.compare.report.tables import Entry, Table

PLOTS = "plots"


def markdown(title: str, sentence: str, parts: Sequence[Section]) -> str:
    """The whole document; figures are links to ``plots/NAME.svg``."""
    blocks = [f"# {_plain(title)}", _plain(sentence)]
    for part in parts:
        blocks += _section(part)
    return "\n\n".join(blocks) + "\n"


def _section(part: Section) -> Iterator[str]:
    yield f"## {_plain(part.title)}"
    yield from (_plain(text) for text in (part.text, part.note) if text)
    for table in part.tables:
        yield f"### {_plain(table.title)}"
        yield _table(table)
        if table.note:
            yield _plain(table.note)
    for picture in part.pictures:
        yield f"![{_plain(picture.caption)}]({PLOTS}/{picture.name}.svg)"
        yield f"*{_plain(picture.caption)}*"
    for listing in part.listings:
        yield f"#### {_plain(listing.title)}"
        # A fence longer than any in the text.
        fence = "`" * max([2, *(len(run) for run in re.findall(r"`+", listing.text))]) + "`"
        yield f"{fence}yaml\n{listing.text.rstrip()}\n{fence}"


def _table(table: Table) -> str:
    columns = range(len(table.header))
    rule = "|".join("---" if column < table.words else "---:" for column in columns)
    lines = ["| " + " | ".join(map(_plain, table.header)) + " |", f"|{rule}|"]
    return "\n".join([*lines, *("| " + " | ".join(map(_entry, line)) + " |" for line in table.lines)])


def _entry(entry: Entry) -> str:
    text = _plain(entry.text)
    return f"**{text}**" if entry.bold else text


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#~$])", r"\\\1", text)
