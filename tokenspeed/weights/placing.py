"""Brings a model's weights to a device: several readers, each part straight to its place, nothing twice in memory.

A weight's segments are cut into pieces that fit a reader's buffer. Values that come in the wanted type and order are
copied from there to their rows of the weight; all others are copied to room beside and unpacked, converted, or moved on
the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from tokenspeed.weights.packed import Weight
from tokenspeed.weights.parts import ALIGNMENT, Part, line_bytes, parts_of, plain_dtype
from tokenspeed.weights.staging import Lane, OpenFiles
from tokenspeed.weights.stored import is_stored
from tokenspeed.weights.tasks import usable_cores
from tokenspeed.weights.unpacked import unpack_all

READERS = 8
BUFFER_BYTES = 8 << 20
"""Each reader has two."""
AHEAD_BYTES = 512 << 20
"""Of packed weights whose reading is asked for before those in front of them are there."""
_REPORTS = 200
"""Most calls of a load's `progress`."""

_Arrival = tuple[int, torch.cuda.Event | None]
"""Packed bytes, and the event of the end of their copy."""
Placed = Iterator[tuple[str, torch.Tensor]]


def place_weights(
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    device: torch.device,
    progress: Callable[[int, int], None] | None = None,
) -> Placed:
    """Every weight, by its name and in order, on `device`: matrices in `dtype`, vectors in float32, of their shapes.

    Weights to come are being read meanwhile, as far as AHEAD_BYTES. What is on the device already is a view where its
    type is right. progress: packed bytes done and in all, 0 at first. Raises FormatError where a file changes
    meanwhile.
    """
    if device.type == "cpu":
        return iter(unpack_all(weights, dtype, progress).items())
    return read_to(device, weights, dtype, progress)


def read_to(
    device: torch.device,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    readers: int = READERS,
    buffer_bytes: int = BUFFER_BYTES,
) -> Placed:
    """`place_weights` through readers, whatever the device."""
    readers = max(1, min(readers, usable_cores()))
    total = sum(weight.nbytes for weight in weights.values())
    with _Readers(device, readers, max(buffer_bytes, _widest(weights) + ALIGNMENT)) as pool:
        source, waiting = iter(weights.items()), deque[_Weight]()
        done = told = pending = 0
        if progress is not None:
            progress(0, total)
        while True:
            while pending < AHEAD_BYTES and (following := next(source, None)) is not None:
                waiting.append(pool.start(*following, dtype))
                pending += waiting[-1].nbytes
            if not waiting:
                return
            first = waiting[0]
            arrived = first.await_one()
            done, pending = done + arrived, pending - arrived
            if progress is not None and done - told >= min(total // _REPORTS, total - told):
                told = done
                progress(done, total)
            if not first.parts:
                waiting.popleft()
                yield first.name, first.tensor


class _Readers:
    """Threads that read parts of weights, each through a lane of its own."""

    def __init__(self, device: torch.device, count: int, nbytes: int) -> None:
        self._device, self._nbytes = device, nbytes
        self._lanes = [Lane(device, nbytes) for _ in range(count)]
        self._idle: SimpleQueue[Lane] = SimpleQueue()
        for lane in self._lanes:
            self._idle.put(lane)
        self._files, self._pool = OpenFiles(), ThreadPoolExecutor(count)

    def start(self, name: str, weight: Weight, dtype: torch.dtype) -> _Weight:
        """Make room for a weight and ask for all its parts."""
        kept = torch.float32 if weight.spec.kind == "vector" else dtype
        if all(segment.data.device.type == "cuda" for segment in weight.segments):
            return _Weight(name, _as_it_lies(weight, kept).to(self._device), weight.nbytes)
        if is_stored(weight):
            return _Weight(name, weight.unpacked(kept, self._device), weight.nbytes)
        made = torch.empty(weight.shape, dtype=kept, device=self._device)
        # The memory may have been another tensor's until now.
        ready = torch.cuda.current_stream(self._device).record_event() if made.is_cuda else None
        parts = parts_of(weight, made.view(-1, weight.spec.cols), self._nbytes)
        return _Weight(name, made, weight.nbytes, deque(self._pool.submit(self._run, part, ready) for part in parts))

    def _run(self, part: Part, ready: torch.cuda.Event | None) -> _Arrival:
        lane = self._idle.get()
        try:
            return part.nbytes, part.run(lane, self._files, ready)
        finally:
            self._idle.put(lane)

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
        for lane in self._lanes:
            lane.finish()  # nobody else knows of copies under way
        self._files.close()


@dataclass(frozen=True)
class _Weight:
    """A weight on its way. parts: those that are not known to have arrived, in order."""

    name: str
    tensor: torch.Tensor
    nbytes: int
    parts: deque[Future[_Arrival]] = field(default_factory=deque)

    def await_one(self) -> int:
        """Wait for its next part, and let the current stream wait for its copy; packed bytes. All of them where there
        is nothing to wait for."""
        if not self.parts:
            return self.nbytes
        nbytes, copied = self.parts.popleft().result()
        if copied is not None:
            torch.cuda.current_stream(self.tensor.device).wait_event(copied)
        return nbytes


def _as_it_lies(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A weight unpacked on its own device; a view where it is of that type already."""
    only = weight.segments[0]
    if len(weight.segments) == 1 and plain_dtype(only) == dtype:
        return only.data.view(dtype).view(weight.shape)
    return weight.unpacked(dtype)


def _widest(weights: Mapping[str, Weight]) -> int:
    read = (weight for weight in weights.values() if not is_stored(weight))
    return max((line_bytes(segment) for weight in read for segment in weight.segments), default=0)
