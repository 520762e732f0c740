"""Reads the files of weights to come while those in front of them are worked on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from tokenspeed.formats.checkpoint import Bytes
from tokenspeed.weights.packed import Weight
from tokenspeed.weights.tasks import usable_cores

READERS = 8
AHEAD_BYTES = 512 << 20
PART_BYTES = 8 << 20
PAGE = 4096


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
