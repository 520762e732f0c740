"""Bytes of a decode step of one sequence, and the time it cannot go below."""

from __future__ import annotations

from collections.abc import Mapping

from tokenspeed.observability.ceilings import read_ceilings
from tokenspeed.ops.definitions import Cost, Workload
from tokenspeed.runner.arena import PageShape
from tokenspeed.runner.model import LoadedModel


def step_bytes(model: LoadedModel, weight_bytes: Mapping[str, float], shape: PageShape, context: int) -> float:
    """Bytes that a decode step of one sequence with `context` tokens moves. weight_bytes: of each weight, by name."""
    work = Workload(1, 1, 1, max(1, context), model.dtype.itemsize, shape.element_bytes, weight_bytes)
    return sum((model.program.cost(record, work) for record in model.program.records), Cost()).bytes


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
    return [(context, step_bytes(model, weight_bytes, shape, context) / bytes_per_ms) for context in contexts]
