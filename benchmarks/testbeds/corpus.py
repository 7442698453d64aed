"""Split the testbed corpus into train, calibration and held-out text, by position, before any training.

Each domain is one file ``corpus/<domain>.txt.xz``. Its last slice is held out, the slice before that is
for calibration, and the rest is for training; cuts fall between paragraphs (or lines, where a file has no
blank lines). A long line that also occurs in an earlier slice is dropped from the later one, because
manuals repeat themselves, so no such line is shared between the three splits.

    python -m benchmarks.testbeds.corpus        # writes heldout/<domain>.txt and calibration.txt
    python -m benchmarks.testbeds.corpus --domains runs/testbeds/calibration   # each domain's calibration text alone
"""

import argparse
import lzma
import random
import re
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
SLICE_FRACTION = 0.02
SLICE_MIN_CHARS = 44_000
HELDOUT_CHARS = 40_000
CALIBRATION_CHARS = 42_000  # a domain's share of calibration.txt
CALIBRATION_CHUNK = 2_000
REPEATED_LINE_CHARS = 80
# WordNet lists its entries by part of speech, so its tail holds adverbs only: reorder it by blocks of lines.
SHUFFLED_BLOCK_LINES = {"wordnet-glosses": 40}


@dataclass(frozen=True)
class Split:
    """The three disjoint parts of one domain's text."""

    domain: str
    train: str
    calibration: str
    heldout: str


def read_domain(path: Path) -> str:
    """The text of one corpus file, reordered in blocks where its order is not representative."""
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    block = SHUFFLED_BLOCK_LINES.get(domain_name(path))
    if block is None:
        return text
    lines = text.split("\n")
    blocks = ["\n".join(lines[i : i + block]) for i in range(0, len(lines), block)]
    random.Random(0).shuffle(blocks)
    return "\n".join(blocks)


def domain_name(path: Path) -> str:
    """``python3.11-doc`` for ``python3.11-doc.txt.xz``."""
    return path.name.removesuffix(".txt.xz")


def next_boundary(text: str, start: int, window: int = 4_000) -> int:
    """The first paragraph boundary at or after `start`; a line boundary where no paragraph ends nearby."""
    for mark in ("\n\n", "\n"):
        found = text.find(mark, start, start + window)
        if found >= 0:
            return found + len(mark)
    newline = text.find("\n", start)
    return len(text) if newline < 0 else newline + 1


def drop_repeats(text: str, seen: set[str]) -> str:
    """`text` without its long lines that are in `seen`."""
    return "\n".join(line for line in text.split("\n") if line not in seen)


def long_lines(text: str) -> set[str]:
    """The lines of `text` that are long enough to count as repeated text."""
    return {line for line in text.split("\n") if len(line) >= REPEATED_LINE_CHARS}


def split_domain(path: Path) -> Split:
    """Cut one corpus file into its train, calibration and held-out text."""
    text = read_domain(path)
    size = max(SLICE_MIN_CHARS, int(len(text) * SLICE_FRACTION))
    first = next_boundary(text, len(text) - 2 * size)
    second = next_boundary(text, len(text) - size)
    train = text[:first]
    seen = long_lines(train)
    calibration = drop_repeats(text[first:second], seen)
    heldout = drop_repeats(text[second:], seen | long_lines(calibration))
    return Split(domain_name(path), train, calibration, heldout)


def load_splits(corpus: Path = HERE / "corpus") -> list[Split]:
    """Every domain's split, sorted by name."""
    paths = sorted(corpus.glob("*.txt.xz"))
    if not paths:
        raise FileNotFoundError(f"no *.txt.xz file in {corpus}")
    return [split_domain(path) for path in paths]


def beginning(text: str, limit: int) -> str:
    """At most the first `limit` characters of `text`, ending at a boundary."""
    if len(text) <= limit:
        return text
    cut = max(text.rfind("\n\n", 0, limit), text.rfind("\n", limit - limit // 20, limit))
    return text[: cut + 1] if cut > limit // 2 else text[:limit]


def chunks(text: str, size: int = CALIBRATION_CHUNK) -> list[str]:
    """`text` in runs of whole lines of about `size` characters."""
    pieces: list[str] = []
    current = ""
    for line in re.split(r"(?<=\n)", text):
        current += line
        if len(current) >= size:
            pieces.append(current)
            current = ""
    return [*pieces, current] if current.strip() else pieces


def calibration_text(splits: list[Split], seed: int = 0) -> str:
    """An even mix over the domains of calibration text, its chunks in a seeded random order."""
    mixed = [piece for split in splits for piece in chunks(beginning(split.calibration, CALIBRATION_CHARS))]
    random.Random(seed).shuffle(mixed)
    return "\n".join(piece.strip("\n") + "\n" for piece in mixed)


def main() -> None:
    """Write the held-out files and the calibration file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=HERE / "corpus", help="folder of *.txt.xz files")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for heldout/ and calibration.txt")
    parser.add_argument("--domains", type=Path, help="write <domain>.txt with calibration text there, and nothing else")
    args = parser.parse_args()
    splits = load_splits(args.corpus)
    if args.domains is not None:
        args.domains.mkdir(parents=True, exist_ok=True)
        for split in splits:
            (args.domains / f"{split.domain}.txt").write_text(split.calibration, encoding="utf-8")
        return
    (args.out / "heldout").mkdir(parents=True, exist_ok=True)
    for split in splits:
        text = beginning(split.heldout, HELDOUT_CHARS)
        (args.out / "heldout" / f"{split.domain}.txt").write_text(text, encoding="utf-8")
        sizes = " + ".join(str(len(part)) for part in (split.train, split.calibration, split.heldout))
        print(f"{split.domain}: {sizes} characters (train + calibration + held-out); wrote {len(text)}")
    mixed = calibration_text(splits)
    (args.out / "calibration.txt").write_text(mixed, encoding="utf-8")
    print(f"calibration.txt: {len(mixed)} characters")


if __name__ == "__main__":
    main()
