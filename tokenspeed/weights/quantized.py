"""Quantizes the matrices of a model at load, for `--quantization`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from tokenspeed.contracts.errors import WeightError
from tokenspeed.formats.blocks import row_bytes
from tokenspeed.quantization.groups import GROUP, quantized_format
from tokenspeed.quantization.pack import pack
from tokenspeed.quantization.unpack import unpack
from tokenspeed.weights.packed import PackedTensor, Weight
from tokenspeed.weights.tasks import run_tasks

logger = logging.getLogger("tokenspeed")
TASK_ELEMENTS = 1 << 22
"""Elements one task packs."""


def quantize_weights(weights: Mapping[str, Weight], mode: str) -> dict[str, Weight]:
    """The same weights with every matrix in the format of `mode` (a key of `quantization.groups.MODES`); vectors stay.

    Routers keep theirs, and so does a matrix whose columns are no multiple of 32, which is said once. Raises
    ConfigError for a matrix that is quantised already, before any work, and WeightError for one with values that cannot
    be.
    """
    formats = {name: _formats(weight, mode) for name, weight in weights.items() if weight.spec.kind != "vector"}
    made = {name: _empty(weight, formats[name]) if name in formats else weight for name, weight in weights.items()}
    kept = [weights[name] for name in formats if made[name] is weights[name]]
    _warn(mode, [weight for weight in kept if weight.spec.kind != "router"])
    tasks = [task for name in formats if made[name] is not weights[name] for task in _tasks(weights[name], made[name])]
    for _ in run_tasks(tasks):
        pass
    return made


def _formats(weight: Weight, mode: str) -> list[str]:
    spec = weight.spec
    return [quantized_format(mode, spec.name, spec.kind, spec.cols, segment.fmt) for segment in weight.segments]


def _empty(weight: Weight, formats: list[str]) -> Weight:
    """The weight with room for its quantised rows; the weight itself where it keeps its formats."""
    if formats == [segment.fmt for segment in weight.segments]:
        return weight
    segments = [
        PackedTensor(_room(old, fmt), fmt, old.rows, old.cols)
        for old, fmt in zip(weight.segments, formats, strict=True)
    ]
    return Weight(weight.spec, segments)


def _room(segment: PackedTensor, fmt: str) -> torch.Tensor:
    return torch.empty(segment.rows, row_bytes(fmt, segment.cols), dtype=torch.uint8, device=segment.data.device)


def _tasks(weight: Weight, made: Weight) -> Iterator[Callable[[], int]]:
    for old, new in zip(weight.segments, made.segments, strict=True):
        step = max(1, TASK_ELEMENTS // old.cols)
        for first in range(0, old.rows, step):
            yield partial(_run, weight.spec.name, old, new, first, min(first + step, old.rows))


def _run(name: str, old: PackedTensor, new: PackedTensor, first: int, last: int) -> int:
    values = unpack(old.rows_at(first, last), old.fmt, old.cols, torch.float32)
    try:
        return pack(values, new.fmt, new.data[first:last]).numel()
    except WeightError as error:
        raise WeightError(f"weight {name}: {error}") from None


def _warn(mode: str, kept: list[Weight]) -> None:
    if kept:
        logger.warning(
            "--quantization %s: %d matrices keep their format, %s with %d columns first (no multiple of %d)",
            mode,
            len(kept),
            kept[0].spec.name,
            kept[0].spec.cols,
            GROUP,
        )
