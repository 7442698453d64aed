"""Everything of an output directory that is not a tensor: config, tokenizer and other files, and the final check."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dernkit.errors import CheckpointError
from dernkit.models.config_text import Value, edit, remove, value_spans
from dernkit.models.headers import INDEX
from dernkit.models.mtp import without_mtp
from dernkit.models.probe import get_field
from dernkit.models.quantised import declarations
from dernkit.models.ragged import FIELD
from dernkit.models.source import SourceModel, open_source

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".ckpt", ".msgpack", ".h5", ".onnx")
TOKENIZER = ("token*", "vocab*", "merges*", "special_tokens*", "added_tokens*", "*.model", "*.tiktoken")
"""Patterns of a tokenizer's files."""
RECORD = "dernkit.json"
"""What a result was made from, and its files."""
SOURCE_CARD = "SOURCE_README.md"
_CARD = re.compile(r"(SOURCE_)*README\.md")


def edited_config(
    source: SourceModel,
    changes: Mapping[tuple[str, ...], int],
    *,
    drop_mtp: bool = False,
    counts: Sequence[int] | None = None,
) -> str:
    """The text of the source's config.json with ``changes`` made under every spelling that is present.

    Spellings are the field's canonical name and the aliases that its config class declares; a field that the text
    leaves to its default is inserted. A quantised source is written in bfloat16: its quantisation goes, and a text
    without a dtype gets that one, as transformers would take it from whichever tensor comes first. ``drop_mtp``: it
    also says that there are no multi-token-prediction layers. ``counts``: experts of every layer, where they differ.
    """
    text = (source.path / "config.json").read_bytes().decode()  # line ends as they are
    edits: dict[tuple[str, ...], Value] = {} if counts is None else {(FIELD,): list(counts)}
    if source.scheme is not None:
        text = remove(text, [path for path, _ in declarations(json.loads(text))])
    present = value_spans(text)
    if source.scheme is not None and not {("dtype",), ("torch_dtype",)} & present.keys():
        edits["dtype",] = "bfloat16"
    if drop_mtp:
        fields, places = without_mtp(source.config, text)
        changes = {**changes, **fields}
        edits |= dict.fromkeys(places, 0)
    for field, value in changes.items():
        spellings = _spellings(source.config, field)
        found = [spelling for spelling in spellings if spelling in present]
        edits |= dict.fromkeys(found or spellings[:1], value)
    return edit(text, edits)


def _spellings(config: Any, field: tuple[str, ...]) -> list[tuple[str, ...]]:
    parent = get_field(config, field[:-1])
    aliases = [alias for alias, target in type(parent).attribute_map.items() if target == field[-1]]
    return [(*field[:-1], name) for name in (field[-1], *aliases)]


def copy_other_files(source: Path, folder: Path) -> None:
    """Copy tokenizer, generation config, code, licence and the like.

    The model card becomes `SOURCE_README.md`, and that of a source's source `SOURCE_SOURCE_README.md`.
    """
    for file in other_files(source):
        shutil.copyfile(file, folder / (f"SOURCE_{file.name}" if _CARD.fullmatch(file.name) else file.name))


def other_files(source: Path) -> list[Path]:
    """Files that are copied as they are, in the order of their names."""
    return [file for file in sorted(source.iterdir()) if file.is_file() and _comes_along(file.name)]


def _comes_along(name: str) -> bool:
    weights = name.endswith((*_WEIGHTS, ".index.json"))
    return not weights and not name.startswith(".") and name not in ("config.json", INDEX, RECORD)


def verify(folder: Path, source: SourceModel, experts: Sequence[int], groups: int) -> SourceModel:
    """Open the finished directory as a stranger would; every name, shape, expert count and the groups must fit.

    Raises:
        CheckpointError: they do not (nothing is published then).
    """
    result = open_source(folder, source.adapters, trust_remote_code=source.trust_remote_code)
    _, blocks = result.outline
    found, wanted = [(block.dims.experts, block.dims.groups) for block in blocks], [(n, groups) for n in experts]
    if found != wanted:
        raise CheckpointError(
            f"{folder}: the MoE layers of the result must have these numbers of experts and groups: {wanted}. "
            f"Got {found} instead. This is a bug of the adapter '{source.adapters[0].name}'."
        )
    return result
