"""What of a model fits a device's memory, and how many sequences decode together within a time. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

MOST_SEQUENCES = 1 << 16
"""More are not asked for."""


@dataclass(frozen=True)
class Fit:
    """Bytes of all weights, of one sequence's keys and values as a step reads them, and of the memory that may be used
    for both. within_ms: a time for each token, of which `within` sequences decode together; None where none was asked
    for."""

    weight_bytes: float
    sequence_bytes: float
    usable_bytes: float
    within_ms: float | None = None
    within: int = 0

    @property
    def sequences(self) -> int:
        """How many there is room for beside the weights; 0 where these alone do not fit."""
        room = self.usable_bytes - self.weight_bytes
        return max(0, min(MOST_SEQUENCES, int(room // self.sequence_bytes))) if self.sequence_bytes else MOST_SEQUENCES

    def summary(self) -> dict[str, Any]:
        """As JSON values."""
        asked = {} if self.within_ms is None else {"within_ms": self.within_ms, "sequences_within": self.within}
        return {
            "held_weight_bytes": round(self.weight_bytes),
            "sequence_kv_bytes": round(self.sequence_bytes),
            "usable_bytes": round(self.usable_bytes),
            "sequences": self.sequences,
            **asked,
        }

    def text(self) -> str:
        """In a line or two."""
        held, each, usable = (value / 1e9 for value in (self.weight_bytes, self.sequence_bytes, self.usable_bytes))
        if self.weight_bytes > self.usable_bytes:
            return f"does not fit: {held:.1f} GB of weights, {usable:.1f} GB may be used"
        fits = f"memory: {held:.1f} GB of weights in {usable:.1f} GB leave room for {self.sequences} such sequences"
        lines = [f"{fits}, {each:.3f} GB each; activations not counted"]
        if self.within_ms is not None:
            lines.append(f"within {self.within_ms:g} ms a token: {self.within} sequences at the floor")
        return "\n".join(lines)


def most_within(milliseconds: float, most: int, step_ms: Callable[[int], float]) -> int:
    """The most sequences up to `most` whose step takes no longer; 0 where one does. step_ms: by sequences, growing."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        if step_ms(middle) <= milliseconds:
            low = middle
        else:
            high = middle - 1
    return low
