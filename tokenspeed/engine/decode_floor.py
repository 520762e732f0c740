"""The time that a decode step of one sequence cannot go below."""

from __future__ import annotations

from collections.abc import Mapping

from tokenspeed.engine.floor import step_bytes
from tokenspeed.observability.ceilings import read_ceilings
from tokenspeed.runner.arena import PageShape
from tokenspeed.runner.model import LoadedModel


def decode_floor(
    model: LoadedModel, weight_bytes: Mapping[str, float], shape: PageShape, longest: int
) -> list[tuple[int, float]]:
    """(context, ms of a decode step at the measured read bandwidth), for powers of two up to `longest` tokens.

    Between two of them the floor is close to a line. Empty on a GPU, and where the bandwidth was never measured.
    """
    ceilings = read_ceilings() if model.device.type == "cpu" else None
    if ceilings is None:
        return []
    contexts = [*(2**power for power in range(longest.bit_length()) if 2**power < longest), longest]
    bytes_per_ms = ceilings.read_gbs * 1e6
    return [
        (context, step_bytes(model, weight_bytes, shape.element_bytes, 1, context) / bytes_per_ms)
        for context in contexts
    ]
