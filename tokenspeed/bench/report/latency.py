"""Latencies of requests as distributions: to the first token, per token after it, between outputs, to the last one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tokenspeed.bench.report.canvas import COLOURS, grid, grid_size, legend_above, natural, plain_numbers, write_picture
from tokenspeed.bench.report.inputs import Inputs
from tokenspeed.bench.serve_report import METRICS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curves = dict[str, dict[str, list[tuple[float, float]]]]
"""By metric and load: milliseconds, and the part of requests (of gaps, for itl) that took no longer."""
AT_MOST = 8
"""Loads in one picture."""
SHARES = (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("max", 1.0))


def curves(inputs: Inputs) -> Curves:
    """From samples of every request where there are some; else through the percentiles that are known."""
    found: Curves = {metric: {} for metric in METRICS}
    for record in inputs.records:
        for metric in METRICS:
            samples = record.samples.get(f"{metric}_ms")
            if samples and record.id.endswith(f".{metric}.p50"):
                ordered = sorted(samples)
                steps = [(at, (place + 1) / len(ordered)) for place, at in enumerate(ordered)]
                found[metric][record.id.removesuffix(f".{metric}.p50")] = [(ordered[0], 0.0), *steps]
    for name, load in inputs.loads.items():
        known = {"ttft": load.ttft_ms, "tpot": load.tpot_ms, "itl": load.itl_ms, "e2e": load.e2e_ms}
        for metric, told in known.items():
            if told is not None:
                found[metric][name] = [(getattr(told, field), share) for field, share in SHARES]
    return {metric: loads for metric, loads in found.items() if loads}


def draw(found: Curves, folder: Path) -> list[Path]:
    """A picture of each eight loads, with a panel per metric; nothing without one."""
    names = sorted({name for loads in found.values() for name in loads}, key=natural)
    files: list[Path] = []
    for number, start in enumerate(range(0, len(names), AT_MOST)):
        stem = folder / ("latency" if number == 0 else f"latency-{number + 1}")
        files += _draw(found, names[start : start + AT_MOST], stem)
    return files


def _draw(found: Curves, names: Sequence[str], stem: Path) -> list[Path]:
    metrics = [metric for metric, loads in found.items() if any(name in loads for name in names)]

    def page(figure: Figure) -> None:
        axes = grid(figure, len(metrics), 2)
        for each, metric in zip(axes, metrics, strict=True):
            for place, name in enumerate(names):
                points = found[metric].get(name, [])
                style = "-" if len(points) != len(SHARES) else "--o"
                each.plot(*_columns(points), style, color=COLOURS[place], label=name, markersize=4)
            each.set_xscale("log")
            each.set_ylim(0, 1.02)
            each.set_yticks([0, 0.25, 0.5, 0.75, 0.9, 1], ["0", "25 %", "50 %", "75 %", "90 %", "all"])
            each.margins(x=0.08)
            each.set(title=f"{metric.upper()}, {METRICS[metric]}", xlabel="ms", ylabel="took no longer")
            plain_numbers(each, "x")
        legend_above(figure, axes)

    return write_picture(stem, grid_size(len(metrics), 2, (4.2, 2.8)), page)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [point[0] for point in points], [point[1] for point in points]


def rows(found: Curves) -> list[list[str]]:
    """Cells of a table: load, metric, milliseconds within which a half, nine tenths, 99 % and all ended."""
    made = []
    for metric, loads in found.items():
        for name, points in loads.items():
            times, shares = _columns(points)
            at = [float(np.interp(share, shares, times)) for _, share in SHARES]
            made.append([name, metric.upper(), *(f"{each:.4g}" for each in at)])
    return sorted(made, key=lambda row: natural(row[0]))


HEADER = ["load", "", "p50 ms", "p90 ms", "p99 ms", "max ms"]
