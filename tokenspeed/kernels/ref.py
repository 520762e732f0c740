"""The `ref` backend: every plain op by its torch reference, on any device. Registered last, so it takes what others
leave."""

from __future__ import annotations

from tokenspeed.kernels.registry import Implementation, Registry
from tokenspeed.ops.reference import REFERENCE


def register(registry: Registry) -> None:
    """Add the reference of every plain op at priority 0."""
    for op, fn in REFERENCE.items():
        registry.add(Implementation("ref", op, "ref", fn, lambda operands, situation: True, priority=0))
