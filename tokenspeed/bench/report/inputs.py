"""What a report is made of: files of records, of `bench serve --json`, of `plan --measured --json`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tokenspeed.bench.record import Record
from tokenspeed.bench.serve_report import Report
from tokenspeed.contracts.errors import ConfigError, FormatError


class StepRow(msgspec.Struct, frozen=True):
    """What a record of a step takes; floor_us is None around the records. Microseconds."""

    op: str
    by: str
    weights: list[str]
    us: float
    gap_us: float
    bytes: int = 0
    floor_us: float | None = None


class Step(msgspec.Struct, frozen=True):
    """A measured decode step, to whose microseconds its rows add up."""

    model: str
    machine: str
    batch: int
    context: int
    rows: list[StepRow]
    step_us: float
    floor_us: float
    bytes: int


@dataclass
class Inputs:
    """All that the files hold, by file name where it has no name of its own. record_files: those of records."""

    records: list[Record] = field(default_factory=list)
    loads: dict[str, Report] = field(default_factory=dict)
    steps: dict[str, Step] = field(default_factory=dict)
    record_files: list[Path] = field(default_factory=list)


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Raises ConfigError that names a file which cannot be read, FormatError one that is none of the known kinds, or
    an id that two files hold."""
    found = Inputs()
    for path in paths:
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
        _add(found, path, raw)
    ids: set[str] = set()
    for record in found.records:
        if record.id in ids:
            raise FormatError(f"the id {record.id} is in the files twice")
        ids.add(record.id)
    return found


def _add(found: Inputs, path: Path, raw: bytes) -> None:
    try:
        content = msgspec.json.decode(raw)
        kind = _kind(content)
        if kind == "records":
            found.records += msgspec.convert(content, list[Record], strict=False)
            found.record_files.append(path)
        elif kind == "load":
            found.loads[path.stem] = msgspec.convert(content, Report)
        elif kind == "step":
            found.steps[path.stem] = msgspec.convert(content, Step)
    except msgspec.MsgspecError as error:
        raise FormatError(f"{path}: not a file of results: {error}") from error
    if not kind:
        known = "records, `bench serve --json`, `plan --measured --json`"
        raise FormatError(f"{path}: not a file of results (known: {known})")


def _kind(content: Any) -> str:
    if isinstance(content, list):
        return "records"
    if isinstance(content, dict) and {"ttft_ms", "output_tok_s"} <= content.keys():
        return "load"
    if isinstance(content, dict) and {"rows", "step_us"} <= content.keys():
        return "step"
    return ""
