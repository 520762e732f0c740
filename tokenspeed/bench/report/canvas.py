"""Where pictures are drawn: matplotlib, loaded on first use and set so that the same data give the same bytes."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tokenspeed.contracts.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

OURS, LIMIT, INK, PALE = "#0b62c4", "#8a8f98", "#24292f", "#d8dde3"
COLOURS = (OURS, "#d9730d", "#2e8b57", "#a03bb0", "#c0392b", "#7a6a00", "#008b9b", "#5b5f97")
MARKS = ("o", "s", "^", "D", "v", "P", "X", "*")
STYLE: dict[str, Any] = {
    "svg.hashsalt": "tokenspeed",
    "svg.fonttype": "path",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": LIMIT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": PALE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
    "hatch.linewidth": 0.6,
}
DOTS_PER_INCH = 130
HALO_POINTS = 2.0


def write_picture(stem: Path, size: tuple[float, float], draw: Callable[[Figure], None]) -> list[Path]:
    """Draw on a page of `size` inches; returns the files written, `stem`.svg and `stem`.png.

    Raises ConfigError that names the extra where matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError(
            "pictures need matplotlib: run `pip install '.[report]' -c constraints.txt` in a checkout"
        ) from None
    stem.parent.mkdir(parents=True, exist_ok=True)
    files = [stem.with_name(f"{stem.name}.{kind}") for kind in ("svg", "png")]
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        cast(dict[str, Any], matplotlib.rcParams).update(STYLE)
        figure = Figure(figsize=size, layout="constrained")
        draw(figure)
        figure.savefig(files[0], metadata={"Date": None, "Creator": None}, facecolor="white")
        figure.savefig(files[1], metadata={"Software": None}, facecolor="white", dpi=DOTS_PER_INCH)
    return files


def halo() -> list[Any]:
    """Path effects of words over lines: a white rim, so that neither hides the other."""
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=HALO_POINTS, foreground="white")]


def grid(figure: Figure, count: int, columns: int = 3) -> list[Axes]:
    """So many panels in rows of `columns`."""
    columns = min(count, columns)
    rows = -(-count // columns)
    return [figure.add_subplot(rows, columns, place + 1) for place in range(count)]


def grid_size(count: int, columns: int = 3, panel: tuple[float, float] = (3.5, 2.7)) -> tuple[float, float]:
    """Inches of a page for them, with room for a legend above."""
    across = min(count, columns)
    return max(panel[0] * across, 5.0), panel[1] * -(-count // columns) + 0.5


def plain_numbers(axes: Axes, which: str) -> None:
    """Ticks of a logarithmic axis as 0.5, 20, 4000, and no more of them than have room."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    for name in which:
        axis = axes.xaxis if name == "x" else axes.yaxis
        low, high = sorted(axis.get_view_interval())
        tens = high / low if low > 0 else 1.0
        steps = (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 7.0) if tens < 4 else (1.0, 2.0, 5.0) if tens < 300 else (1.0,)
        axis.set_major_locator(LogLocator(subs=steps, numticks=99))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.6g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())


def natural(name: str) -> list[tuple[int, str]]:
    """A key that sorts c4 before c16."""
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", name)]


def legend_above(figure: Figure, axes: Sequence[Axes]) -> None:
    """One legend for all panels, each name once."""
    named = {name: mark for each in axes for mark, name in zip(*each.get_legend_handles_labels(), strict=True)}
    if named:
        widest = 0.6 + 0.085 * max(map(len, named))
        columns = max(1, min(len(named), int(figure.get_figwidth() / widest)))
        figure.legend(list(named.values()), list(named), loc="outside upper left", ncols=columns)
