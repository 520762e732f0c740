"""One decode step op by op: what each must move, its floor, what it takes and the gap before it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from tokenspeed.bench.gpu.waterfall import role
from tokenspeed.bench.report.canvas import COLOURS, INK, LIMIT, OURS, legend_above, write_picture
from tokenspeed.bench.report.inputs import Step

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

GAP = COLOURS[1]
LEAST = 0.004
"""Of the step: what takes less is drawn as one."""


@dataclass
class Op:
    """All records of one role, in microseconds. floor_us: 0 around the records."""

    name: str
    count: int = 0
    bytes: int = 0
    floor_us: float = 0.0
    us: float = 0.0
    gap_us: float = 0.0

    @property
    def spent_us(self) -> float:
        """With the gaps."""
        return self.us + self.gap_us


def ops(step: Step) -> list[Op]:
    """In the order in which they first come; small ones together at the end. All of them add up to the step."""
    found: dict[str, Op] = {}
    for row in step.rows:
        name = role(row.op, row.weights)
        op = found.setdefault(name, Op(name))
        op.count += 1
        op.bytes += row.bytes
        op.floor_us += row.floor_us or 0.0
        op.us += row.us
        op.gap_us += row.gap_us
    small = [op for op in found.values() if op.spent_us < LEAST * step.step_us]
    if len(small) < 2:
        return list(found.values())
    rest = Op("the rest")
    for op in small:
        rest.count += op.count
        rest.bytes += op.bytes
        rest.floor_us += op.floor_us
        rest.us += op.us
        rest.gap_us += op.gap_us
    return [*(op for op in found.values() if op not in small), rest]


def draw(step: Step, stem: Path) -> list[Path]:
    """Bars that begin where the one above ends; beside each its bytes, floor, time and gap."""
    found = ops(step)

    def page(figure: Figure) -> None:
        from matplotlib.ticker import StrMethodFormatter

        axes, table = figure.subplots(1, 2, width_ratios=(3.0, 2.3), sharey=True)
        _bars(axes, found)
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.set(xlabel="us of a step", title=f"{step.model}, batch {step.batch}, context {step.context}")
        axes.set_yticks(range(len(found)), [op.name for op in found])
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        _columns(table, found, step)
        legend_above(figure, [axes])

    return write_picture(stem, (9.5, 1.5 + 0.27 * (len(found) + 1)), page)


def _bars(axes: Axes, found: list[Op]) -> None:
    """Of each op the gap before it, its floor, and what it takes above that."""
    floors = [min(op.floor_us, op.spent_us) for op in found]
    above = [max(0.0, op.us - floor) for op, floor in zip(found, floors, strict=True)]
    gaps = [max(0.0, op.spent_us - floor - more) for op, floor, more in zip(found, floors, above, strict=True)]
    starts = [0.0, *accumulate(op.spent_us for op in found)][:-1]
    for widths, label, style in (
        (gaps, "gap", {"color": GAP}),
        (floors, "floor", {"color": OURS}),
        (above, "above the floor", {"color": "#bcd4f2", "edgecolor": OURS, "linewidth": 0.4}),
    ):
        if any(widths):
            axes.barh(range(len(found)), widths, left=starts, height=0.72, label=label, **style)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]


def _columns(axes: Axes, found: list[Op], step: Step) -> None:
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    titles = ("MB", "floor us", "us", "gap us", "share")
    places = (0.14, 0.37, 0.58, 0.79, 1.0)
    whole = Op("step", 0, step.bytes, step.floor_us, sum(op.us for op in found), sum(op.gap_us for op in found))
    for x, title in zip(places, titles, strict=True):
        axes.text(x, -0.9, title, ha="right", va="center", fontsize=8, color=INK, weight="bold")
    for y, op in enumerate([*found, whole]):
        weight = "bold" if op is whole else "normal"
        for x, text in zip(places, cells(op), strict=True):
            axes.text(x, y, text, ha="right", va="center", fontsize=8, color=INK, weight=weight)
    axes.axhline(len(found) - 0.5, color=LIMIT, linewidth=0.6)


def cells(op: Op) -> list[str]:
    """MB, floor, time, gap, share of the floor; empty where there is none."""
    share = f"{op.floor_us / op.spent_us:.0%}" if op.floor_us and op.spent_us else ""
    floor = (f"{op.bytes / 1e6:,.1f}", f"{op.floor_us:,.1f}") if op.floor_us else ("", "")
    return [*floor, f"{op.us:,.1f}", f"{op.gap_us:,.1f}", share]


def rows(step: Step) -> list[list[str]]:
    """Cells of a table: op, how often, bytes, floor, time, gap, share."""
    return [[op.name, str(op.count), *cells(op)] for op in ops(step)]


HEADER = ["op", "records", "MB", "floor us", "us", "gap us", "share of the floor"]
