"""What commands list, in words and columns."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dernkit.components import Component


def row(component: Component) -> dict[str, Any]:
    """A component and where it comes from, as `dernkit plugins` has it."""
    provenance = component.provenance
    return {
        "kind": component.kind,
        "name": component.name,
        "plugin": provenance.plugin,
        "distribution": provenance.distribution,
        "version": provenance.version,
        "file": provenance.file,
        "line": provenance.line,
        "source": f"{Path(provenance.file).name}:{provenance.line}",
        "summary": component.summary,
    }


def facts_in_words(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Label and value of each line of `dernkit inspect`."""
    share = facts["expert_bytes"] / facts["bytes"]
    groups = "none"
    if facts["groups"] > 1:
        groups = f"{facts['groups']}, a token uses {facts['top_k_groups']}; keep a multiple of {facts['groups']}"
    quantisation = [("quantisation", f"{facts['quantisation']}, read as bf16")] if facts["quantisation"] else []
    mtp = f"{facts['mtp_bytes']:,} bytes, experts in {', '.join(facts['mtp_layers']) or 'none of them'}"
    return [
        ("family", facts["family"]),
        ("MoE layers", f"{facts['moe_layers']} (decoder layers {_ranges(facts['layers'])})"),
        *([("MTP layers", mtp)] if facts["mtp_bytes"] else []),
        ("experts", f"{_spread(facts['experts_by_layer'])} per layer, top-{facts['top_k']}"),
        ("router", facts["router"]),
        ("groups", groups),
        ("width", f"{facts['width']} (hidden {facts['hidden']})"),
        ("new width", facts["new_width"]),
        ("smallest keep", f"{facts['smallest_keep']} of {facts['experts']} experts"),
        *quantisation,
        ("parameters", f"{facts['parameters']:,}"),
        ("bytes", f"{facts['bytes']:,} in {facts['shards']} file(s), {', '.join(facts['dtypes'])}"),
        ("in experts", f"{facts['expert_bytes']:,} bytes ({share:.1%})"),
        ("can", facts["can"]),
    ]


def _spread(counts: list[int]) -> str:
    return str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 as ``1 to 3, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]} to {run[-1]}" for run in runs)


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    """Wrapped on a terminal; elsewhere a row is a line, for tools that search lines."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(*header, box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for row in rows:
        shown.add_row(*row)
    console = Console(markup=False, highlight=False, emoji=False)
    if not console.is_terminal:
        console.width = 10_000
    console.print(shown)
