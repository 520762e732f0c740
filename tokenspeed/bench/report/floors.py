"""The floor of a decode step over numbers of sequences: what it is made of, and what it leaves each user."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed.bench.report.canvas import COLOURS, INK, LIMIT, OURS, halo, plain_numbers, write_picture
from tokenspeed.sol.floor import total
from tokenspeed.sol.report import StepReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 0.03
"""Ops below this part of every step are drawn as one."""


def draw(report: StepReport, stem: Path) -> list[Path]:
    """Two panels of a report that has a curve: milliseconds by op, and tokens per second of a user and of all."""

    def page(figure: Figure) -> None:
        parts, speeds = figure.subplots(1, 2)
        draw_parts(parts, report)
        _speeds(speeds, report)
        stored = "" if report.quantization == "none" else f", {report.quantization}"
        name = f"{report.model}{stored} on {report.ceilings.machine}, context {report.work.context}: the floor"
        figure.suptitle(name, x=0.01, ha="left", fontsize=11, weight="bold")
        figure.legend(loc="outside lower left", ncols=8)

    return write_picture(stem, (9.5, 4.0), page)


def shares(report: StepReport) -> dict[str, list[float]]:
    """Milliseconds by op for each number of sequences of the curve, the largest op first; small ones together."""
    ops = sorted({op for floors in report.curve.values() for op in floors})
    taken = {op: [1e3 * floors[op].seconds for floors in report.curve.values()] for op in ops}
    whole = [sum(column) for column in zip(*taken.values(), strict=True)]
    large = [op for op in ops if any(ms >= NAMED * all for ms, all in zip(taken[op], whole, strict=True))]
    found = {op: taken[op] for op in sorted(large, key=lambda op: -max(taken[op]))}
    small = [taken[op] for op in ops if op not in large]
    return found | ({"other": [sum(column) for column in zip(*small, strict=True)]} if small else {})


def draw_parts(axes: Axes, report: StepReport) -> None:
    """Milliseconds by op over numbers of sequences, and the time asked about."""
    at = list(report.curve)
    found = shares(report)
    colours = [LIMIT if op == "other" else COLOURS[place % len(COLOURS)] for place, op in enumerate(found)]
    axes.stackplot(at, list(found.values()), labels=list(found), colors=colours, alpha=0.85, linewidth=0)
    axes.set_xscale("log", base=2)
    axes.set_xlim(at[0], at[-1])
    axes.set_ylim(0, 1.05 * max(map(sum, zip(*found.values(), strict=True))))
    if report.fit is not None and report.fit.within_ms is not None:
        _limit(axes, report.fit.within_ms, f"{report.fit.within_ms:g} ms: {report.fit.within} sequences")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set(title="ms of a step, by op", xlabel="sequences decoding together", ylabel="ms")


def _limit(axes: Axes, ms: float, words: str) -> None:
    """A line at so many milliseconds; words alone where it lies so high that the steps below it would be flat."""
    top = axes.get_ylim()[1]
    if ms < 2 * top:
        axes.set_ylim(0, max(top, 1.12 * ms))
        axes.axhline(ms, color=INK, linestyle=":", linewidth=1.2)
        place, offset = (0.0, ms / axes.get_ylim()[1]), (6, 3)
    else:
        place, offset = (0.0, 1.0), (6, -12)
    corner: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "xytext": offset}
    axes.annotate(words, place, fontsize=8, path_effects=halo(), **corner)


def _speeds(axes: Axes, report: StepReport) -> None:
    times = {n: total(list(floors.values())).seconds for n, floors in report.curve.items()}
    users, whole = [1 / seconds for seconds in times.values()], [n / seconds for n, seconds in times.items()]
    axes.plot(users, whole, "-o", color=OURS, markersize=4)
    for n, user, all in zip(times, users, whole, strict=True):
        full = report.fit is not None and n == report.fit.sequences
        words, offset = (f"{n}, all that fit", (-6, -14)) if full else (str(n), (6, 2))
        axes.annotate(words, (user, all), textcoords="offset points", xytext=offset, fontsize=7.5, path_effects=halo())
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(0.14)
    plain_numbers(axes, "xy")
    axes.set(title="what it leaves", xlabel="tok/s per user", ylabel="tok/s in all")
