"""Tokens per second of one user against those of the whole GPU: what more users at once cost each of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenspeed.bench.gpu.peers import CARD, DECODE_MS, OTHER_WORK
from tokenspeed.bench.record import Record
from tokenspeed.bench.report.canvas import (
    COLOURS,
    LIMIT,
    MARKS,
    grid,
    grid_size,
    halo,
    legend_above,
    natural,
    plain_numbers,
    write_picture,
)
from tokenspeed.bench.report.inputs import Inputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DECODE = re.compile(r"(?P<card>[a-z][a-z0-9_-]*)\.(?P<name>.+)\.decode\.b(?P<batch>\d+)")
"""Milliseconds per token of each of so many sequences."""
AT_ONCE = re.compile(r"\.c(\d+)(?=\.|$)")
OURS, FLOOR = "TokenSpeed", "floor"


class Point(NamedTuple):
    """Tokens per second of one user, and of a GPU (or of the machine without one); sequences at once."""

    user: float
    all: float
    at_once: int | None


@dataclass
class Panel:
    """Lines by name, of one model or load on one kind of machine."""

    title: str
    unit: str
    lines: dict[str, list[Point]] = field(default_factory=dict)

    def add(self, name: str, point: Point) -> None:
        """At the end of a line."""
        self.lines.setdefault(name, []).append(point)


def panels(inputs: Inputs) -> list[Panel]:
    """In the order of their titles, points by falling speed of a user."""
    found: dict[str, Panel] = {}
    for record in inputs.records:
        _decode(found, record)
    _loads(found, inputs.records)
    for name, load in inputs.loads.items():
        if load.tpot_ms is not None:
            panel = found.setdefault(name, Panel(name, "machine"))
            panel.add(OURS, Point(1e3 / load.tpot_ms.p50, load.output_tok_s, None))
    for panel in found.values():
        panel.lines = {name: sorted(points, key=lambda point: -point.user) for name, points in panel.lines.items()}
    return [found[title] for title in sorted(found, key=natural)]


def _unit(record: Record) -> str:
    return "GPU" if record.machine.gpu else "machine"


def _decode(found: dict[str, Panel], record: Record) -> None:
    match = DECODE.fullmatch(record.id)
    if match is None or record.unit != "ms":
        return
    batch, gpus = int(match["batch"]), max(record.machine.gpus, 1)
    title = " ".join(match["name"].rsplit(".", 1))
    panel = found.setdefault(title, Panel(title, _unit(record)))
    panel.add(OURS, _point(batch, record.value, gpus))
    for engine, figures in DECODE_MS.items():
        taken = figures.get(match["name"], {}).get(batch) if match["card"] == CARD else None
        if taken is not None:
            other = ", experts by its own router" if match["name"] in OTHER_WORK else ""
            panel.add(f"{engine}{other}", _point(batch, taken, 1))
    if record.floor:
        panel.add(FLOOR, _point(batch, record.floor, gpus))


def _point(batch: int, milliseconds: float, gpus: int) -> Point:
    return Point(1e3 / milliseconds, batch * 1e3 / milliseconds / gpus, batch)


def _loads(found: dict[str, Panel], records: Sequence[Record]) -> None:
    """Those that `bench serve` and `bench compare` record."""
    by_id = {record.id: record for record in records}
    for id, record in by_id.items():
        prefix = id.removesuffix(".output.tok_s")
        user, tpot = by_id.get(f"{prefix}.user.tok_s"), by_id.get(f"{prefix}.tpot.p50")
        if prefix == id or (user is None and tpot is None):
            continue
        at_once = AT_ONCE.search(prefix)
        title, line = AT_ONCE.sub("", prefix), OURS
        if id.startswith("compare."):
            title, _, line = title.rpartition(".")
            line = OURS if line == "ours" else line
        speed = user.value if user is not None else 1e3 / tpot.value if tpot is not None else 0.0
        panel = found.setdefault(title, Panel(title, _unit(record)))
        whole = record.value / max(record.machine.gpus, 1)
        panel.add(line, Point(speed, whole, int(at_once[1]) if at_once else None))


def draw(found: Sequence[Panel], stem: Path) -> list[Path]:
    """A picture with a panel for each; nothing without one."""
    if not found:
        return []

    def page(figure: Figure) -> None:
        axes = grid(figure, len(found))
        others = sorted({name for panel in found for name in panel.lines} - {OURS, FLOOR})
        for each, panel in zip(axes, found, strict=True):
            _panel(each, panel, others)
        legend_above(figure, axes)

    return write_picture(stem, grid_size(len(found)), page)


def _panel(axes: Axes, panel: Panel, others: Sequence[str]) -> None:
    """others: names of all panels that are neither ours nor the floor's, which tell colours."""
    labelled = OURS if OURS in panel.lines else min(panel.lines)
    for name in (FLOOR, *others, OURS):
        points = panel.lines.get(name, [])
        if not points:
            continue
        place = others.index(name) + 1 if name in others else 0
        colour = LIMIT if name == FLOOR else COLOURS[place % len(COLOURS)]
        mark, style = (".", "--") if name == FLOOR else (MARKS[place % len(MARKS)], "-")
        users, whole = [point.user for point in points], [point.all for point in points]
        axes.plot(users, whole, style, color=colour, marker=mark, label=name, zorder=3 if name == OURS else 2)
        if name == labelled:
            _label(axes, points, colour)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.16)
    axes.set(title=panel.title, xlabel="tok/s per user", ylabel=f"tok/s per {panel.unit}")
    plain_numbers(axes, "xy")


def _label(axes: Axes, points: Sequence[Point], colour: str) -> None:
    for point in points:
        if point.at_once is not None:
            axes.annotate(
                str(point.at_once),
                (point.user, point.all),
                textcoords="offset points",
                xytext=(6, 2),
                ha="left",
                va="bottom",
                fontsize=7.5,
                color=colour,
                path_effects=halo(),
                zorder=4,
            )


def rows(found: Sequence[Panel]) -> list[list[str]]:
    """Cells of a table: model or load, engine, at once, per user, per GPU."""
    return [
        [
            panel.title,
            name,
            "" if point.at_once is None else str(point.at_once),
            f"{point.user:.4g}",
            f"{point.all:.4g}",
        ]
        for panel in found
        for name, points in panel.lines.items()
        for point in points
    ]


HEADER = ["model or load", "engine", "at once", "tok/s per user", "tok/s per GPU (or machine)"]
