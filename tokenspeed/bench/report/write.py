"""A folder with a report: its pages, and pictures as SVG and PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenspeed.bench.record import Record
from tokenspeed.bench.report import history, latency, pareto, roofline, steps
from tokenspeed.bench.report.inputs import Inputs, read_inputs
from tokenspeed.bench.report.pages import Part, html, markdown
from tokenspeed.bench.table import HEADER, line
from tokenspeed.contracts.errors import ConfigError

TITLE = "Measured figures"
RECORDS_HEADER = [cell.strip() for cell in HEADER.strip("|").split("|")]


def write_report(files: Sequence[Path], out: Path, ids: Sequence[str] = ()) -> list[Path]:
    """Write report.md, report.html and their pictures into `out`; returns the files. ids: patterns of those whose
    history is shown; by default those that changed most often.

    Raises ConfigError without anything to show, or a pattern that no id matches, and the errors of `read_inputs`.
    """
    inputs = read_inputs(files)
    if not (inputs.records or inputs.loads or inputs.steps):
        raise ConfigError(f"{', '.join(map(str, files)) or 'no file'}: no results in there")
    told = history.lines(inputs.record_files, inputs.records, ids)
    if ids and not told:
        raise ConfigError(f"--history {' '.join(ids)}: no id with two versions in the history of these files")
    written: list[Path] = []
    parts = [*_pictured(inputs, out, written), _history(told, out, written), *_tables(inputs)]
    shown = [part for part in parts if part.pictures or part.rows]
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.md", markdown(TITLE, shown)), ("report.html", html(TITLE, shown))):
        (out / name).write_text(text, encoding="utf-8")
        written.append(out / name)
    return written


def _pictured(inputs: Inputs, out: Path, written: list[Path]) -> list[Part]:
    panels, curves, roof = pareto.panels(inputs), latency.curves(inputs), roofline.roofline(inputs)
    several = [panel for panel in panels if any(len(points) > 1 for points in panel.lines.values())]
    parts = [
        Part(
            "Speed of a user, and of all",
            "Each point is a number of users at once (written beside it). Up and to the right is better; nothing "
            "can be beyond the floor. Logarithmic axes.",
            _svg(pareto.draw(several or panels, out / "pareto"), written),
            pareto.HEADER,
            pareto.rows(panels),
        ),
        Part(
            "Roofline of decode steps",
            "Bytes per second that a step reaches, counted from the model's shapes. At the floor: each op by bytes or "
            "by operations, whichever takes longer. Written beside each point: its share of the floor.",
            [
                *_svg(roofline.draw_models(roof, out / "roofline"), written),
                *_svg(roofline.draw_bars(roof, out / "roofline-memory"), written),
            ],
            roofline.HEADER,
            roofline.rows(roof),
        ),
        Part(
            "Latencies",
            "How many requests took no longer. Dashed lines join the percentiles of loads whose single requests were "
            "not kept.",
            _svg(latency.draw(curves, out), written),
            latency.HEADER,
            latency.rows(curves),
        ),
    ]
    for name, step in sorted(inputs.steps.items()):
        parts.append(
            Part(
                f"One decode step: {step.model}, batch {step.batch}, context {step.context}",
                f"On {step.machine}: {step.step_us:,.1f} us, {step.floor_us:,.1f} us at the floor. Every op begins "
                "where the one before it ended.",
                _svg(steps.draw(step, out / f"step-{name}"), written),
                steps.HEADER,
                steps.rows(step),
            )
        )
    return parts


def _history(told: Sequence[history.Line], out: Path, written: list[Path]) -> Part:
    return Part(
        "Over the commits",
        "Ids of the highest number of measured versions in the history of their files; dashed: the target.",
        _svg(history.draw(told, out / "history"), written),
        history.HEADER,
        history.rows(told),
    )


def _tables(inputs: Inputs) -> list[Part]:
    rooms: dict[str, list[Record]] = {}
    for record in sorted(inputs.records, key=lambda record: record.id):
        rooms.setdefault(record.id.split(".")[0], []).append(record)
    return [
        Part(f"Figures of {room}", _where(records), (), RECORDS_HEADER, _cells(records))
        for room, records in rooms.items()
    ]


def _where(records: Sequence[Record]) -> str:
    places = sorted({f"{each.machine.gpu or each.machine.cpu}, {each.date}" for each in records})
    return f"{'; '.join(places)}."


def _cells(records: Sequence[Record]) -> list[list[str]]:
    return [[cell.strip() for cell in line(record).strip("|").split("|")] for record in records]


def _svg(files: Sequence[Path], written: list[Path]) -> list[str]:
    written += files
    return [path.name for path in files if path.suffix == ".svg"]
