"""Bytes per second that decode steps reach, against what the memory gives: per model and batch, and per measured id."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from tokenspeed.bench.record import Record
from tokenspeed.bench.report.canvas import LIMIT, OURS, PALE, grid, grid_size, legend_above, write_picture
from tokenspeed.bench.report.inputs import Inputs
from tokenspeed.bench.report.pareto import DECODE
from tokenspeed.models.registry import shipped_configs
from tokenspeed.sol.floor import GPUS
from tokenspeed.sol.report import StepReport, step_report

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PROMPT, DRAWN = 1024, 128
"""Of a decode row without `.ctx<N>`: its sequences hold the first and half of the second in its middle."""
FORMATS = {"bf16": "none", "mxfp4": "none", "fp8": "fp8", "int8": "int8", "int4": "int4"}
"""--quantization of a format; gpt-oss comes in MXFP4."""


class Reached(NamedTuple):
    """GB/s of a decode row, and those at its floor: less than the memory's where operations bind."""

    batch: int
    gb_s: float
    floor_gb_s: float


class Bar(NamedTuple):
    """GB/s reached by something, and the ceiling of the same run."""

    name: str
    gb_s: float
    ceiling_gb_s: float


@dataclass(frozen=True)
class Roofline:
    """ceilings: GB/s by model. models: decode rows by model, by growing batch. bars: of other ids."""

    models: dict[str, list[Reached]]
    ceilings: dict[str, float]
    bars: list[Bar]


def floor_of(record: Record) -> StepReport | None:
    """`sol` of a decode row of a shipped model on a known GPU; None for anything else."""
    match = DECODE.fullmatch(record.id)
    model, _, stored = match["name"].rpartition(".") if match else ("", "", "")
    gpu = next((name for name in GPUS if name in (record.machine.gpu or "")), None)
    if match is None or gpu is None or model not in shipped_configs() or stored not in FORMATS:
        return None
    return step_report(model, gpu, int(match["batch"]), PROMPT + DRAWN // 2, FORMATS[stored])


def roofline(inputs: Inputs) -> Roofline:
    """Of all records that tell of bytes."""
    found = Roofline({}, {}, [])
    for record in inputs.records:
        step = floor_of(record)
        if step is not None and record.unit == "ms":
            name, moved = record.id.split(".", 1)[1].rpartition(".decode.")[0], step.total.cost.bytes / 1e9
            reached = Reached(step.work.batch, moved / record.value * 1e3, moved / step.total.seconds)
            found.models.setdefault(name, []).append(reached)
            found.ceilings[name] = step.ceilings.read_gbs
        elif record.ceiling_gb_s and record.bus_share is not None:
            found.bars.append(Bar(record.id, record.bus_share * record.ceiling_gb_s, record.ceiling_gb_s))
    for rows in found.models.values():
        rows.sort()
    return found


def draw_models(found: Roofline, stem: Path) -> list[Path]:
    """A picture with a panel for each model; nothing without one."""
    if not found.models:
        return []

    def page(figure: Figure) -> None:
        axes = grid(figure, len(found.models))
        for each, name in zip(axes, sorted(found.models), strict=True):
            _panel(each, name, found)
        legend_above(figure, axes)

    return write_picture(stem, grid_size(len(found.models)), page)


def _panel(axes: Axes, name: str, found: Roofline) -> None:
    rows, ceiling = found.models[name], found.ceilings[name]
    batches = [row.batch for row in rows]
    axes.axhline(ceiling / 1e3, color=LIMIT, linewidth=1.2, label="memory's ceiling")
    if any(row.floor_gb_s < 0.99 * ceiling for row in rows):
        axes.plot(batches, [row.floor_gb_s / 1e3 for row in rows], "--.", color=LIMIT, label="at the floor (sol)")
    axes.plot(batches, [row.gb_s / 1e3 for row in rows], "-o", color=OURS, label="reached")
    for row in rows:
        share = f"{row.gb_s / row.floor_gb_s:.0%}"
        axes.annotate(
            share, (row.batch, row.gb_s / 1e3), textcoords="offset points", xytext=(0, -13), ha="center", fontsize=7.5
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(each) for each in batches])
    axes.minorticks_off()
    axes.margins(x=0.15)
    axes.set_ylim(0, 1.1 * ceiling / 1e3)
    axes.set(title=" ".join(name.rsplit(".", 1)), xlabel="sequences decoding together", ylabel="TB/s")


def draw_bars(found: Roofline, stem: Path) -> list[Path]:
    """A bar for each id, and a mark at its ceiling; nothing without one."""
    if not found.bars:
        return []

    def page(figure: Figure) -> None:
        axes = figure.add_subplot()
        places = range(len(found.bars))
        names = [bar.name for bar in found.bars]
        axes.barh(places, [bar.ceiling_gb_s for bar in found.bars], color=PALE, height=0.7, label="memory's ceiling")
        axes.barh(places, [bar.gb_s for bar in found.bars], color=OURS, height=0.7, label="reached")
        for place, bar in zip(places, found.bars, strict=True):
            share = f"{bar.gb_s / bar.ceiling_gb_s:.0%}"
            axes.annotate(
                share, (bar.ceiling_gb_s, place), textcoords="offset points", xytext=(4, 0), va="center", fontsize=8
            )
        axes.set_xlim(0, 1.1 * max(bar.ceiling_gb_s for bar in found.bars))
        axes.set_yticks(places, names)
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set(xlabel="GB/s, each beside the read bandwidth measured in the same run")
        legend_above(figure, [axes])

    return write_picture(stem, (7.5, 0.9 + 0.27 * len(found.bars)), page)


def rows(found: Roofline) -> list[list[str]]:
    """Cells of a table: what, batch, GB/s, GB/s at the floor, ceiling, share of the ceiling."""
    models = [
        [name, str(row.batch), f"{row.gb_s:.4g}", f"{row.floor_gb_s:.4g}", *_share(row.gb_s, found.ceilings[name])]
        for name in sorted(found.models)
        for row in found.models[name]
    ]
    return models + [[bar.name, "", f"{bar.gb_s:.4g}", "", *_share(bar.gb_s, bar.ceiling_gb_s)] for bar in found.bars]


def _share(reached: float, ceiling: float) -> Sequence[str]:
    return f"{ceiling:.4g}", f"{reached / ceiling:.0%}"


HEADER = ["what", "batch", "GB/s", "GB/s at the floor", "ceiling GB/s", "share of the ceiling"]
