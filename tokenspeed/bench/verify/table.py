"""What was measured and what is allowed: rows of a table, as text and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """A measured value and the largest that is allowed; one that is no number is never allowed."""

    name: str
    measured: float
    bound: float

    @property
    def ok(self) -> bool:
        return math.isfinite(self.measured) and self.measured <= self.bound


@dataclass(frozen=True)
class Row:
    """One thing that was checked. part: kernels, layers, log-probabilities or batch invariance. by: what computed it.
    where: the worst case, or what the figures are over."""

    part: str
    name: str
    by: str
    where: str
    figures: tuple[Figure, ...]

    @property
    def ok(self) -> bool:
        return all(figure.ok for figure in self.figures)

    def as_json(self) -> dict[str, Any]:
        """Figures that are no numbers become null."""
        figures = [
            {"name": f.name, "measured": f.measured if math.isfinite(f.measured) else None, "bound": f.bound}
            for f in self.figures
        ]
        return {
            "part": self.part, "name": self.name, "by": self.by, "where": self.where, "ok": self.ok, "figures": figures
        }  # fmt: skip

    def text(self) -> str:
        """One line."""
        figures = ", ".join(f"{f.name} {f.measured:.2g} of {f.bound:.2g}" for f in self.figures)
        return f"{'ok' if self.ok else 'BROKEN':<7}{self.name:<46} {self.by:<26} {figures}  ({self.where})"


@dataclass
class Report:
    """All rows, and what was left out and why. setting: of the run: model, device, versions, seed."""

    setting: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing is broken."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def add(self, rows: Sequence[Row]) -> None:
        """Take in rows and print them."""
        for part in dict.fromkeys(row.part for row in rows):
            print(f"\n{part}", flush=True)
            for row in rows:
                if row.part == part:
                    print(row.text(), flush=True)
        self.rows += rows

    def note(self, text: str) -> None:
        """Say what is not checked."""
        print(f"note: {text}", flush=True)
        self.notes.append(text)

    def summary(self) -> str:
        """The last line."""
        broken = [row for row in self.rows if not row.ok]
        if not broken:
            return f"{len(self.rows)} checks, none broken" if self.rows else "nothing was checked"
        return f"{len(broken)} of {len(self.rows)} checks broken: " + "; ".join(f"{r.name} ({r.by})" for r in broken)

    def as_json(self) -> dict[str, Any]:
        """For a file."""
        return {
            **self.setting, "ok": self.ok, "notes": self.notes, "rows": [row.as_json() for row in self.rows]
        }  # fmt: skip
