"""Which implementations exist for an op, and which one a bucket takes. No torch here.

An implementation states its op (plain or fused), the backend it belongs to, and a predicate over the situation;
whatever differs between devices, formats and row counts is said in that predicate and nowhere else.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenspeed.ops.definitions import Operands


@dataclass(frozen=True)
class Situation:
    """What a choice may depend on: device type, compute dtype, most tokens of the bucket, and stored weight formats.
    batch_invariant: only what gives a row the same bits in every batch may be chosen."""

    device: str
    dtype: str
    tokens: int
    formats: Mapping[str, tuple[str, ...]]
    batch_invariant: bool = False


@dataclass(frozen=True)
class Implementation:
    """A way to run an op. `run` is what its backend calls; `takes` says whether it fits. Higher priority is asked
    first. invariant: a row's outcome is the same, bit by bit, whatever the number and the content of other rows, and
    however a sequence is cut into steps."""

    name: str
    op: str
    backend: str
    run: Callable[..., Any]
    takes: Callable[[Operands, Situation], bool]
    priority: int
    invariant: bool = False


class Registry:
    """Implementations by op."""

    def __init__(self) -> None:
        self._by_op: dict[str, list[Implementation]] = defaultdict(list)

    def add(self, implementation: Implementation) -> None:
        """Register; the name must be new for its op."""
        known = self._by_op[implementation.op]
        if any(other.name == implementation.name for other in known):
            raise ValueError(f"{implementation.name} is registered twice for {implementation.op}")
        known.append(implementation)
        known.sort(key=lambda item: -item.priority)

    def implementations(self, op: str) -> tuple[Implementation, ...]:
        """All of an op, the first to be asked first."""
        return tuple(self._by_op.get(op, ()))

    def choose(self, op: str, operands: Operands, situation: Situation) -> Implementation | None:
        """The first that fits, or None."""
        known = self._by_op.get(op, ())
        promising = [item for item in known if item.invariant or not situation.batch_invariant]
        return next((item for item in promising if item.takes(operands, situation)), None)
