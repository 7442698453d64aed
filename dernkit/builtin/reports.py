"""Documents about a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, final

import yaml

from dernkit.api import hookimpl

_HEADLINES = ("loss", "perplexity", "bits_per_byte", "acc", "acc_norm", "word_perplexity", "exact_match")


@final
@dataclass(frozen=True)
class Markdown:
    """`report.md`: what was done, what it cost, and what it did to the model."""

    name: ClassVar[str] = "markdown"
    filename: ClassVar[str] = "report.md"

    def render(self, run: Mapping[str, Any]) -> str:
        """The report; ``run`` as `dernkit.run.gather` makes it."""
        sections = [
            [run["export"]["sentence"], "", f"# {run['name']}", "", _first_sentence(run)],
            _sizes(run),
            _evaluation(run),
            _layers(run),
            _fits(run),
            _stages(run),
            _components(run),
        ]
        return "\n\n".join("\n".join(section) for section in sections if section) + "\n"


def _first_sentence(run: Mapping[str, Any]) -> str:
    before, after, counts = run["source"], run["result"], run["export"]["experts_by_layer"]
    kept = str(counts[0]) if len(set(counts)) == 1 else f"{min(counts)} to {max(counts)}"
    what, key = ("parameters", "parameters") if before["quantisation"] else ("expert bytes", "expert_bytes")
    share = 1 - after[key] / before[key]
    width = "" if before["width"] == after["width"] else f", width {before['width']} → {after['width']}"
    groups = "" if before["groups"] == after["groups"] else f", router groups {before['groups']} → {after['groups']}"
    return (
        f"`{run['model']}` ({before['family']}): {before['experts']} → {kept} experts in {before['moe_layers']} layers"
        f"{width}{groups}; {what} fall by {share:.1%}.{_mtp(run)}{_quantisation(before['quantisation'])}"
    )


def _quantisation(scheme: str | None) -> str:
    if scheme is None:
        return ""
    return (
        f"\n\nThe source is quantised ({scheme}). It was read as bf16 and the result is written in bf16, without "
        f"quantisation: bytes before and after are of two formats."
    )


def _mtp(run: Mapping[str, Any]) -> str:
    before, after = run["source"], run["result"]
    if not before["mtp_bytes"]:
        return ""
    if not after["mtp_bytes"]:
        return " The multi-token-prediction layers were dropped."
    where = ", ".join(f"`{path}`" for path in before["mtp_layers"]) or "none"
    return f" Multi-token-prediction layers with experts ({where}) got the plan of layer {before['layers'][-1]}."


def _sizes(run: Mapping[str, Any]) -> list[str]:
    counts = run["export"]["experts_by_layer"]
    before = run["source"] | {"kept": sum(run["source"]["experts_by_layer"])}
    after = run["result"] | {"kept": sum(counts)}
    rows = [
        [label, f"{before[key]:,}", f"{after[key]:,}", f"{after[key] / before[key]:.1%}"]
        for label, key in (
            ("experts per layer", "experts") if len(set(counts)) == 1 else ("experts in all layers", "kept"),
            ("expert width", "width"),
            ("parameters", "parameters"),
            ("bytes", "bytes"),
            ("bytes in experts", "expert_bytes"),
        )
    ]
    return ["## Size", "", *_table(["", "before", "after", "after / before"], rows)]


def _evaluation(run: Mapping[str, Any]) -> list[str]:
    if not run["evaluation"]:
        return []
    lines = ["## Before and after", ""]
    for key, before in run["evaluation"]["before"].items():
        after = run["evaluation"]["after"][key]
        rows = [
            [metric, f"{value:.4f}", f"{after[metric]:.4f}", f"{after[metric] - value:+.4f}"]
            for metric, value in before.items()
            if metric.rpartition("/")[2].partition(",")[0] in _HEADLINES
        ]
        counts = sum(int(value) for metric, value in before.items() if metric.endswith("/tokens"))
        note = f" ({counts:,} tokens)" if counts else ""
        lines += [f"`{key.partition(':')[2]}`{note}", "", *_table(["metric", "before", "after", "change"], rows), ""]
    return lines[:-1]


def _layers(run: Mapping[str, Any]) -> list[str]:
    rows = []
    for layer, item in run["plan"]["layers"].items():
        received: dict[str, int] = {}
        for flows in item["moved_from_to"].values():
            for target, count in flows.items():
                received[target] = received.get(target, 0) + count
        arrivals = ", ".join(f"{target}: {received[target]}" for target in sorted(received, key=int))
        dead = [str(e) for e in item.get("unrouted", [])]
        rows.append(
            [
                layer,
                ", ".join(map(str, item["kept"])),
                f"{item['moved_segments']:,}",
                f"{item['discarded_segments']:,}",
                arrivals or "none",
                ", ".join(dead) or "none",
            ]
        )
    header = ["layer", "kept experts", "segments moved", "discarded", "received by (expert: segments)", "saw no token"]
    return ["## Layers", "", *_table(header, rows)]


def _fits(run: Mapping[str, Any]) -> list[str]:
    fits = run["fits"]
    if not fits:
        return []
    rows = [
        [
            layer,
            _share(fit["inside"]),
            _share(fit["outside"]),
            f"{fit['fewest']:,}",
            f"{fit['fewest'] / fit['width']:.1f}",
        ]
        for layer, fit in fits.items()
    ]
    header = ["layer", "error, fitted text", "error, held-out text", "fewest tokens of an expert", "tokens per neuron"]
    note = [
        "Squared error of the routed experts' sum as a share of its energy: on sampled inputs that the layer was "
        "fitted to, and on those of the end of the text, which nothing was fitted to (`calibrate.holdout`)."
    ]
    short = [layer for layer, fit in fits.items() if fit["fewest"] < fit["width"]]
    if short:
        note.append(
            f"In {len(short)} of {len(fits)} layers (first: {short[0]}) an expert has fewer sampled tokens than "
            "neurons, and its projections hang on the ridge. Raise `calibrate.sample` and the number of tokens."
        )
    return ["## Refit", "", " ".join(note), "", *_table(header, rows)]


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _stages(run: Mapping[str, Any]) -> list[str]:
    rows = [
        [name, f"{stage['seconds']:.1f}", f"{stage['peak_bytes'] / 2**20:,.0f}"]
        for name, stage in run["stages"].items()
    ]
    if not rows:
        return []
    note = "Time and peak resident memory of the process when a stage last ran (one whose inputs match is skipped)."
    return ["## Stages", "", note, "", *_table(["stage", "seconds", "peak MiB"], rows)]


def _components(run: Mapping[str, Any]) -> list[str]:
    lock = run["lock"]
    rows = [[c["kind"], c["name"], c["distribution"], c["version"]] for c in lock["components"]]
    versions = ", ".join(f"{name} {version}" for name, version in lock["versions"].items())
    tokens = _calibration(run["calibration"])
    return [
        "## How it was made",
        "",
        f"Seed {run['recipe']['seed']}.{tokens} {versions}.",
        "",
        *_table(["kind", "component", "distribution", "version"], rows),
        "",
        "```yaml",
        yaml.safe_dump(run["recipe"], sort_keys=False, width=100, default_flow_style=None).rstrip(),
        "```",
    ]


def _calibration(done: Mapping[str, Any] | None) -> str:
    if done is None:
        return ""
    how = ", each layer on the outputs of the compressed layers before it" if done["sequential"] else ""
    how = f", statistics of another run (`{done['statistics']}`)" if done["statistics"] else how
    return f" Calibration: {done['tokens']:,} tokens{how}."


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield "| " + " | ".join(header) + " |"
    yield "|" + "---|" * len(header)
    for row in rows:
        yield "| " + " | ".join(row) + " |"


@hookimpl
def dernkit_reports() -> list[type]:
    """The reports that come with dernkit."""
    return [Markdown]
