"""The `ref` backend: every plain op by its torch reference, on any device. Registered last, so it takes what others
leave."""

from __future__ import annotations

from collections.abc import Collection

from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.ops.definitions import Operands
from tokenspeed.ops.reference import REFERENCE

VIEWS = ("split",)
"""References that compute nothing. Of the others torch may choose kernels by the number of rows."""


def register(registry: Registry, but: Collection[str] = ()) -> None:
    """Add the reference of every plain op, `but` some, at priority 0."""
    for op, fn in REFERENCE.items():
        if op in but:
            continue
        registry.add(Implementation("ref", op, "ref", fn, _always, priority=0, invariant=op in VIEWS))


def _always(operands: Operands, situation: Situation) -> bool:
    return True
