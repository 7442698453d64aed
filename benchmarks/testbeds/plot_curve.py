"""Plot a training run's ``curve.jsonl``: losses over tokens, and each layer's least-used expert.

python -m benchmarks.testbeds.plot_curve CURVE.jsonl CURVE.png
"""

import argparse
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot


def plot(rows: list[dict], out: Path) -> None:
    """Draw the two panels and write the image."""
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(8, 7), sharex=True, height_ratios=(2, 1))
    millions = [row["tokens"] / 1e6 for row in rows]
    upper.plot(millions, [row["loss"] for row in rows], color="tab:blue", linewidth=0.8, label="training")
    held = [row for row in rows if "heldout" in row]
    upper.plot(
        [row["tokens"] / 1e6 for row in held],
        [row["heldout"] for row in held],
        "o-",
        color="tab:red",
        markersize=4,
        label="held-out, mean over domains",
    )
    upper.set_ylabel("loss (nats/token)")
    if "lr" in rows[0]:
        rate = upper.twinx()
        rate.plot(millions, [row["lr"] for row in rows], color="tab:gray", linestyle=":", label="learning rate")
        rate.set_ylabel("learning rate (dotted)")
    upper.legend(loc="upper right")
    sparse = [row for row in rows if row.get("experts", 2) > 1]
    for layer in range(len(rows[-1]["min_share"])):
        shares = [100 * row["min_share"][layer] for row in sparse]
        lower.plot([row["tokens"] / 1e6 for row in sparse], shares, linewidth=0.8, label=f"layer {layer}")
    if len(sparse) < len(rows):
        for axes in (upper, lower):
            axes.axvline(sparse[0]["tokens"] / 1e6, color="black", linestyle="--", linewidth=0.8)
        upper.annotate(" upcycled", (sparse[0]["tokens"] / 1e6, upper.get_ylim()[1]), va="top")
    lower.legend(loc="center left")
    lower.set_ylim(bottom=0)
    lower.set_ylabel("least-used expert\n(% of assignments)")
    lower.set_xlabel("training tokens (millions)")
    figure.tight_layout()
    figure.savefig(out, dpi=100)


def main() -> None:
    """Read the curve and plot it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("curve", type=Path, help="curve.jsonl of a run")
    parser.add_argument("out", type=Path, help="image to write")
    args = parser.parse_args()
    plot([json.loads(line) for line in args.curve.read_text().splitlines()], args.out)


if __name__ == "__main__":
    main()
