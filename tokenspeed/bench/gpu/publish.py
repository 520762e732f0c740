"""Records of one run: made with what surrounds it, printed as they come, and written at once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenspeed.bench.gpu.targets import target_of
from tokenspeed.bench.record import Record, surroundings, write


class Publisher:
    """Makes, prints and keeps records. out: the file they go into as they come; None for printing alone."""

    def __init__(self, command: str, out: Path | None) -> None:
        self._around = surroundings(command)
        self._out = out
        self.records: list[Record] = []

    def add(self, id: str, value: float, unit: str, **fields: Any) -> Record:
        """One figure, with the target that its id has. Raises ConfigError for fields that contradict each other."""
        floor = fields.get("floor")
        if floor is not None and value > 0:
            fields.setdefault("share", floor / value)
        fields.setdefault("target", target_of(id))
        made = Record(id=id, value=value, unit=unit, **fields, **self._around)
        print(line(made), flush=True)
        self.records.append(made)
        if self._out is not None:
            write(self._out, [made])
        return made


def line(record: Record) -> str:
    """Id, value, floor with the share of it reached, the ratio, and whether the target is met."""
    parts = [f"{record.id}: {record.value:.4g} {record.unit}"]
    if record.floor is not None and record.share is not None:
        parts.append(f"floor {record.floor:.4g} ({record.share:.0%})")
    if record.ratio is not None:
        parts.append(f"{record.ratio.median:.3f} of {record.peer} {record.peer_value:.4g}")
    if record.target is not None:
        bound = record.target
        sign, number = ("<=", bound.at_most) if bound.at_most is not None else (">=", bound.at_least)
        verdict = {None: "not decided", True: "met", False: "MISSED"}[record.met()]
        parts.append(f"{bound.of} {sign} {number:g}: {verdict}")
    return ", ".join(parts)
