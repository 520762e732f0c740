"""What an id was over the commits that changed its file."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenspeed.bench.record import Record
from tokenspeed.bench.report.canvas import LIMIT, OURS, grid, grid_size, halo, write_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AT_MOST = 12
"""Ids in a picture where none are asked for: those that changed most often."""


class Told(NamedTuple):
    """A figure as a commit has it."""

    commit: str
    date: str
    value: float


@dataclass
class Line:
    """An id over commits, the oldest first; only those at which it changed. metric: the record's field."""

    id: str
    metric: str
    unit: str
    target: float | None
    told: list[Told] = field(default_factory=list)


def lines(files: Sequence[Path], records: Sequence[Record], wanted: Sequence[str] = ()) -> list[Line]:
    """Of the ids that match a pattern of `wanted`, or without one of those that changed most often. Files that no
    commit holds have no history; a version that cannot be read is passed over."""
    found = {
        record.id: _line(record)
        for record in records
        if (any(fnmatch(record.id, each) for each in wanted) if wanted else record.target is not None)
    }
    for path in files:
        for commit, date in _commits(path):
            for id, entry in _entries(path, commit).items():
                if id in found:
                    _add(found[id], commit, date, entry)
    changed = [line for line in found.values() if len(line.told) > 1]
    if wanted:
        return sorted(changed, key=lambda line: line.id)
    most = sorted(changed, key=lambda line: (-len(line.told), line.id))[:AT_MOST]
    return sorted(most, key=lambda line: line.id)


def _line(record: Record) -> Line:
    metric = record.target.of if record.target else "ratio" if record.ratio else "value"
    aim = record.target
    bound = None if aim is None else aim.at_least if aim.at_most is None else aim.at_most
    return Line(record.id, metric, record.unit if metric == "value" else metric.replace("_", " "), bound)


def _add(line: Line, commit: str, date: str, entry: dict[str, Any]) -> None:
    value = entry.get(line.metric)
    if isinstance(value, dict):
        value = value.get("median")
    if isinstance(value, int | float) and (not line.told or line.told[-1].value != value):
        line.told.append(Told(commit, date, float(value)))


def _commits(path: Path) -> list[tuple[str, str]]:
    """Short hash and day of those that changed it, the oldest first."""
    said = _git(path, "log", "--reverse", "--format=%h %cs", "--", path.name)
    return [(line.split()[0], line.split()[1]) for line in said.splitlines()]


def _entries(path: Path, commit: str) -> dict[str, dict[str, Any]]:
    try:
        content = json.loads(_git(path, "show", f"{commit}:./{path.name}"))
        return {entry["id"]: entry for entry in content}
    except (ValueError, KeyError, TypeError):
        return {}


def _git(path: Path, *arguments: str) -> str:
    command = ["git", "-C", str(path.resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def draw(found: Sequence[Line], stem: Path) -> list[Path]:
    """A picture with a panel for each id; nothing without one."""
    if not found:
        return []

    def page(figure: Figure) -> None:
        for axes, line in zip(grid(figure, len(found)), found, strict=True):
            _panel(axes, line)

    return write_picture(stem, grid_size(len(found), panel=(3.5, 2.1)), page)


def _panel(axes: Axes, line: Line) -> None:
    places = range(len(line.told))
    values = [each.value for each in line.told]
    axes.plot(places, values, "-o", color=OURS)
    axes.annotate(
        f"{values[-1]:.4g}",
        (places[-1], values[-1]),
        textcoords="offset points",
        xytext=(5, 4),
        fontsize=8,
        color=OURS,
        path_effects=halo(),
    )
    if line.target is not None:
        axes.hlines(line.target, -0.3, places[-1] + 0.1, color=LIMIT, linestyles="--", linewidth=1.2)
    top = max([*values, line.target or 0.0])
    axes.set_ylim(0 if min(values) >= 0 else None, 1.2 * top if top > 0 else None)
    axes.set_xlim(-0.3, len(values) - 0.4)
    axes.set_xticks(places, [each.commit[:7] for each in line.told], rotation=35, ha="right", fontsize=7)
    axes.set_title(line.id, fontsize=8)
    axes.set_ylabel(line.unit)


def rows(found: Sequence[Line]) -> list[list[str]]:
    """Cells of a table: id, figure, what it was at each commit."""
    return [
        [line.id, line.unit, ", ".join(f"{each.value:.4g} ({each.commit}, {each.date})" for each in line.told)]
        for line in found
    ]


HEADER = ["id", "", "at each commit that changed it"]
