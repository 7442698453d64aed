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

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f6a00", "#9467bd")
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
    width: float
    """In CSS pixels."""
    svg: str
    """An SVG element whose text has the colour of what is around it."""

    @property
    def broad(self) -> bool:
        """Whether it would be too small in one of two columns."""
        return self.width > 640

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
) -> Picture:
    """A figure with ``grid`` = (rows, columns) of axes that ``paint(figure, axes[rows, columns])`` fills.

    Args:
        size: width and height in inches.
    """
    from matplotlib import style
    from matplotlib.figure import Figure as Canvas

    # "default": the settings of whoever runs this change nothing.
    with style.context(["default", _STYLE | {"svg.hashsalt": name}]):
        figure = Canvas(figsize=size, layout="constrained")
        axes = figure.subplots(*grid, squeeze=False)
        paint(figure, axes)
        for one in axes.flat:
            if not one.has_data():
                one.set_axis_off()
        text = io.StringIO()
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    return Picture(name, caption, 96 * size[0], _element(text.getvalue(), name))


_STYLE: dict[str, Any] = {
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
    """The SVG element alone, with the page's colour and only those ids that it refers to, none of another figure."""
    text = text[text.index("<svg") :].strip().replace(_INK, "currentColor")
    used = set(re.findall(r'(?:href="|url\()#([^")]*)', text))
    text = re.sub(r' id="([^"]*)"', lambda found: f' id="{name}-{found[1]}"' if found[1] in used else "", text)
    text = re.sub(r'(href="|url\()#', rf"\1#{name}-", text)
    return re.sub(r"[ \t]+$", "", text, flags=re.MULTILINE)


def slug(*parts: object) -> str:
    """A name for files and ids; a digest keeps names apart that differ in other characters only."""
    whole = " ".join(map(str, parts))
    plain = re.sub(r"[^a-z0-9]+", "-", whole.lower()).strip("-")
    return f"{plain[:48]}-{hashlib.sha256(whole.encode()).hexdigest()[:6]}"


def short(name: str, length: int = 40) -> str:
    """A label for axes, shortened in its middle; matplotlib would read ``$`` as mathematics."""
    if len(name) > length:
        name = f"{name[: length // 2]}…{name[len(name) + 1 + length // 2 - length :]}"
    return name.replace("$", r"\$")


def margin(labels: Sequence[str]) -> float:
    """Inches that labels take at the left of a figure."""
    return 0.075 * max(map(len, labels), default=0)


def heat(
    axes: Axes,
    values: NDArray[np.float64],
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    limits: tuple[float, float],
    cmap: str = SEQUENTIAL,
    bad: str = "#00000000",
    write: Callable[[float], str] | None = None,
) -> Any:
    """A heat map [rows, columns] with a label at each row, and figures in the cells if ``write`` is given.

    Args:
        bad: colour of what is nan.
    """
    from matplotlib import colormaps

    colours = colormaps[cmap].with_extremes(bad=bad)
    image = axes.imshow(values, cmap=colours, vmin=limits[0], vmax=limits[1], aspect="auto")
    thin(axes.yaxis, rows)
    thin(axes.xaxis, columns)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if write:
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                ink = "#ffffff" if _dark(image.to_rgba(np.array([value]))[0]) else "#111111"
                axes.text(column, row, write(float(value)), ha="center", va="center", color=ink, fontsize=7.5)
    return image


def _dark(colour: NDArray[np.float64]) -> bool:
    return float(np.dot(colour[:3], (0.299, 0.587, 0.114))) < 0.52


def thin(axis: Any, labels: Sequence[str], most: int = 32) -> None:
    """Labels of an axis, every n-th where there are too many; long ones of the x axis stand upright."""
    step = max(1, -(-len(labels) // most))
    places = list(range(0, len(labels), step))
    upright = axis.axis_name == "x" and max((len(labels[i]) for i in places), default=0) > 3
    turn = {"rotation": 40, "ha": "right", "rotation_mode": "anchor"} if upright else {}
    axis.set_ticks(places, [labels[i] for i in places], **turn)


def inner(axes: Any, count: int) -> None:
    """Labels of axes at the left and at the bottom of a grid only, of which ``count`` are drawn."""
    columns = axes.shape[1]
    for i, one in enumerate(axes.flat[:count]):
        if i % columns:
            one.set_ylabel("")
        if i + columns < count:
            one.set_xlabel("")
