"""Unpacks a whole model once, for backends that compute on plain matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

import torch

from tokenspeed.weights.packed import PackedTensor, Weight
from tokenspeed.weights.tasks import run_tasks

TASK_ELEMENTS = 1 << 24
"""Elements one task unpacks: enough tasks to share out, few enough to cost nothing."""


def unpack_all(
    weights: Mapping[str, Weight], dtype: torch.dtype, progress: Callable[[int, int], None] | None = None
) -> dict[str, torch.Tensor]:
    """Every weight unpacked: matrices [rows, cols] in `dtype`, vectors in float32.

    progress: packed bytes done and in all.
    """
    made = {name: _empty(weight, dtype) for name, weight in weights.items()}
    tasks = [partial(_run, *task) for name, weight in weights.items() for task in _tasks(weight, made[name])]
    total, done = sum(weight.nbytes for weight in weights.values()), 0
    for nbytes in run_tasks(tasks):
        done += nbytes
        if progress is not None:
            progress(done, total)
    return made


def _empty(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    kept = torch.float32 if weight.spec.kind == "vector" else dtype
    return torch.empty(weight.shape, dtype=kept, device=weight.segments[0].data.device)


def _tasks(weight: Weight, out: torch.Tensor) -> Iterator[tuple[PackedTensor, torch.Tensor, int, int]]:
    rows = out.view(-1, weight.spec.cols)
    start = 0
    for segment in weight.segments:
        target = rows[start : start + segment.rows]
        step = max(1, TASK_ELEMENTS // segment.cols // segment.unit) * segment.unit
        for first in range(0, segment.rows, step):
            yield segment, target, first, min(first + step, segment.rows)
        start += segment.rows


def _run(segment: PackedTensor, target: torch.Tensor, first: int, last: int) -> int:
    nbytes = segment.unpack_rows(first, last, target.dtype, target[first:last])
    if not segment.heads:  # tasks end in any order, and a moved row may lie in another's part
        segment.drop_pages(first, last)
    return nbytes
