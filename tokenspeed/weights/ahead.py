"""Reads the files of weights to come while those in front of them are worked on: into memory, or to a device."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from tokenspeed.formats.checkpoint import Bytes
from tokenspeed.weights.packed import PackedTensor, Weight, share_bytes
from tokenspeed.weights.reading import read_to
from tokenspeed.weights.spec import WeightSpec
from tokenspeed.weights.tasks import usable_cores

READERS = 8
AHEAD_BYTES = 512 << 20
PART_BYTES = 8 << 20
PAGE = 4096
ALIGNMENT = 256
"""Of each view on a device."""


def brought(weights: Mapping[str, Weight], device: torch.device) -> Iterator[tuple[str, Weight]]:
    """Each weight in order with the bytes of its files on `device`, as they are; on the CPU they stay in the map."""
    return read_ahead(weights) if device.type == "cpu" else bytes_to(device, weights)


def bytes_to(device: torch.device, weights: Mapping[str, Weight]) -> Iterator[tuple[str, Weight]]:
    """`brought` by readers, whatever the device; what has no file stays where it is."""
    raw = {name: _as_bytes(weight) for name, weight in weights.items() if any(part.views for part in weight.segments)}
    coming = read_to(device, raw, torch.uint8)
    for name, weight in weights.items():
        yield name, _over(weight, next(coming)[1]) if name in raw else weight


def _over(weight: Weight, whole: torch.Tensor) -> Weight:
    """The weight over its bytes as `_as_bytes` has them."""
    at, moved = 0, []
    for segment in weight.segments:
        views = []
        for view in segment.views:
            views.append(whole[at : at + view.nbytes, 0])
            at += -(-view.nbytes // ALIGNMENT) * ALIGNMENT
        moved.append(segment.with_views(views) if views else segment)
    return Weight(weight.spec, moved)


def _as_bytes(weight: Weight) -> Weight:
    """All views of a weight as one column of bytes, each from a multiple of ALIGNMENT on."""
    parts = []
    for segment in weight.segments:
        for view in segment.views:
            gap = torch.zeros(-view.nbytes % ALIGNMENT, 1, dtype=torch.uint8)
            parts.append(PackedTensor(share_bytes(view).view(-1, 1), "U8", view.nbytes, 1, mapped=view))
            parts += [PackedTensor(gap, "U8", len(gap), 1)] if len(gap) else []
    spec = WeightSpec(weight.spec.name, (sum(part.rows for part in parts), 1), "linear", (), ())
    return Weight(spec, parts)


def read_ahead(weights: Mapping[str, Weight]) -> Iterator[tuple[str, Weight]]:
    """Each weight in order, when the pages of its file's map are in memory; threads read those behind, as far as
    AHEAD_BYTES."""
    with ThreadPoolExecutor(min(READERS, usable_cores())) as pool:
        source, waiting, pending = iter(weights.items()), deque[tuple[str, Weight, list[Future[int]]]](), 0
        while True:
            while pending < AHEAD_BYTES and (following := next(source, None)) is not None:
                name, weight = following
                waiting.append((name, weight, [pool.submit(_touch, part) for part in _parts(weight)]))
                pending += weight.nbytes
            if not waiting:
                return
            name, weight, reads = waiting.popleft()
            for read in reads:
                read.result()
            yield name, weight
            pending -= weight.nbytes


def _parts(weight: Weight) -> Iterator[Bytes]:
    for segment in weight.segments:
        for view in segment.views:
            yield from (view[at : at + PART_BYTES] for at in range(0, len(view), PART_BYTES))


def _touch(part: Bytes) -> int:
    return int(part[::PAGE].sum()) + int(part[-1])
