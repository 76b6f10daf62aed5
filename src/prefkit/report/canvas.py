"""The drawing surface that every figure shares: palette, letters, size, and writing the PNG file.

Figures are 4.6 inches wide, so that their 10-point letters stay legible on a phone. matplotlib is imported
when the first one is drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefkit.report.metrics import number
from prefkit.report.read import Estimate

# Okabe and Ito's palette, told apart with every common colour blindness, without its yellow (faint on white).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
INK, FAINT = "#333333", "#9A9A9A"

STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlecolor": INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#E6E6E6",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "lines.linewidth": 2.0,
    "figure.facecolor": "white",
    "savefig.dpi": 200,
}
SIZE = (4.6, 2.9)
MARGINS = (0.62, 0.75, 0.5, 0.42)
"""inches left (tick labels), right (line labels), below and above; fixed, so that figures side by side line up"""


@dataclass(frozen=True)
class Figure:
    """A drawn PNG; `alt` says in words what it shows."""

    name: str
    path: Path
    title: str
    alt: str


def save(
    name: str,
    title: str,
    alt: str,
    folder: Path,
    paint: Callable[[Any], None],
    *,
    size: tuple[float, float] = SIZE,
    margins: tuple[float, float, float, float] = MARGINS,
    whole_x: bool = False,
) -> Figure:
    """Draws one pair of axes by `paint` and writes folder/name.png; margins as in MARGINS.

    With `whole_x` the horizontal axis counts, and has ticks at whole numbers only.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.png"
    with matplotlib.rc_context(rc=STYLE):
        canvas = Canvas(figsize=size)
        FigureCanvasAgg(canvas)
        left, right, bottom, top = margins
        axes = canvas.subplots()
        canvas.subplots_adjust(left / size[0], bottom / size[1], 1 - right / size[0], 1 - top / size[1])
        axes.set_title(title, pad=10)
        paint(axes)
        if axes.axison:
            _write_ticks(axes.xaxis, whole=whole_x)
            _write_ticks(axes.yaxis)
        canvas.savefig(path, metadata={"Software": None})
    return Figure(name, path, title, alt)


def _write_ticks(axis: Any, *, whole: bool = False) -> None:
    """Few ticks in as few digits as tell them apart; matplotlib's own would put an offset or 1e-5 above the axis."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10], integer=whole))
    low, high = sorted(axis.get_view_interval())
    shown = [tick for tick in axis.get_majorticklocs() if low <= tick <= high]
    digits = next((d for d in range(2, 9) if len({f"{tick:.{d}g}" for tick in shown}) == len(shown)), 9)
    axis.set_major_formatter(lambda value, _: f"{value:.{max(digits, 3)}g}".replace("-", "−"))


def interval_text(estimate: Estimate) -> str:
    """'[0.51, 0.63]', or 'unbounded' for a single group."""
    return f"[{number(estimate.low)}, {number(estimate.high)}]" if estimate.bounded else "unbounded"
