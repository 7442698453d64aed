"""What the documentation tests read: fenced blocks, links and headings of the repository's markdown files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "benchmarks/README.md", *ROOT.glob("plugins/*/README.md")]
)

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SKIP = re.compile(r"<!-- test: skip (.+) -->\n\Z")
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)")
_HEADING = re.compile(r"^#{1,6} (.+)$", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Block:
    """One fenced block."""

    line: int
    language: str
    text: str
    skip: str
    """Why it is not run; empty when it is."""


def blocks(page: Path) -> list[Block]:
    """All fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in _FENCE.finditer(text):
        skip = _SKIP.search(text[: match.start()])
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(line, match[1], match[2], skip[1] if skip else ""))
    return found


def links(page: Path) -> Iterator[tuple[str, str]]:
    """Path and anchor of every link that stays in the repository."""
    for target in _LINK.findall(_prose(page)):
        if "://" not in target and not target.startswith("mailto:"):
            path, _, anchor = target.partition("#")
            yield path, anchor


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings get."""
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in _HEADING.findall(_prose(page))}


def headings(page: Path) -> list[str]:
    """The headings of a page."""
    return _HEADING.findall(_prose(page))


def name(page: Path) -> str:
    """A page as test ids show it."""
    return str(page.relative_to(ROOT))


def _prose(page: Path) -> str:
    return _FENCE.sub("", page.read_text(encoding="utf-8"))
