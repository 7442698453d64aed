"""Figures as SVG text: the same data give the same bytes, and no state is shared between them."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dernkit.errors import RecipeError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6a00", "#5e4fa2")
"""Okabe and Ito's colours that the colour-blind tell apart, their yellow and black replaced by readable ones."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
FAINT = "#8c8c8c"
SEQUENTIAL, DIVERGING = "cividis", "PuOr_r"
_INK = "#010203"
"""Stands for the text colour of the page."""


@dataclass(frozen=True, slots=True)
class Picture:
    """A drawn figure."""

    name: str
    """Of its file, without the suffix."""
    caption: str
    alt: str
    """What it shows, for those who do not see it."""
    svg: str
    """An SVG element whose text has the colour of what is around it."""

    def file(self) -> str:
        """The same as a file of its own: dark on white."""
        head = '<svg style="background:#ffffff;color:#222222"'
        return '<?xml version="1.0" encoding="utf-8"?>\n' + self.svg.replace("<svg", head, 1) + "\n"


def available() -> None:
    """Refuse with a sentence where what draws is missing."""
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise RecipeError(
            f"compare: reports need the packages matplotlib and jinja2. Got an environment without {error.name} "
            f"instead. Run pip install 'dernkit[compare]'."
        ) from None


def draw(
    name: str,
    caption: str,
    paint: Callable[[Figure, Any], None],
    *,
    size: tuple[float, float],
    grid: tuple[int, int] = (1, 1),
    alt: str = "",
) -> Picture:
    """A figure with ``grid`` = (rows, columns) of axes that ``paint(figure, axes[rows, columns])`` fills.

    Args:
        size: width and height in inches.
    """
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Canvas(figsize=size, layout="constrained")
        axes = figure.subplots(*grid, squeeze=False)
        paint(figure, axes)
        for one in axes.flat:
            if not one.has_data():
                one.set_axis_off()
        text = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return Picture(name, caption, alt or caption, _element(text.getvalue(), name))


_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "image.interpolation": "none",
    "legend.frameon": False,
} | {
    key: _INK
    for key in ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
}


def _element(text: str, name: str) -> str:
    """The SVG element alone, with the page's colour and with ids that no other figure of the page has."""
    text = text[text.index("<svg") :].strip().replace(_INK, "currentColor")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def slug(*parts: object) -> str:
    """A name for files and ids; a digest keeps names apart that differ in other characters only."""
    whole = " ".join(map(str, parts))
    plain = re.sub(r"[^a-z0-9]+", "-", whole.lower()).strip("-")
    return f"{plain[:48]}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def short(name: str, length: int = 30) -> str:
    """A label for axes: matplotlib would read ``$`` as mathematics."""
    name = name if len(name) <= length else f"{name[: length - 1]}…"
    return name.replace("$", r"\$")


def heat(
    axes: Axes,
    values: NDArray[np.float64],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    cmap: str = SEQUENTIAL,
    write: Callable[[float], str] | None = None,
) -> Any:
    """A heat map [rows, columns] with a label at each row, and figures in the cells if ``write`` is given."""
    image = axes.imshow(values, cmap=cmap, vmin=limits[0], vmax=limits[1], aspect="auto")
    thin(axes.yaxis, rows)
    thin(axes.xaxis, columns)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if write:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "#ffffff" if _dark(image.cmap(image.norm(value))) else "#111111"
                axes.text(column, row, write(float(value)), ha="center", va="center", color=ink, fontsize=7.5)
    return image


def _dark(colour: Sequence[float]) -> bool:
    return float(np.dot(colour[:3], (0.299, 0.587, 0.114))) < 0.52


def thin(axis: Any, labels: Sequence[str], most: int = 32) -> None:
    """Labels of an axis, every n-th where there are too many; long ones of the x axis stand upright."""
    step = max(1, -(-len(labels) // most))
    places = list(range(0, len(labels), step))
    upright = axis.axis_name == "x" and max((len(labels[i]) for i in places), default=0) > 3
    turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if upright else {}
    axis.set_ticks(places, [labels[i] for i in places], **turn)
