"""Readers that bring weights to a device, each part straight to its place, nothing twice in memory.

A weight's segments are cut into pieces that fit a reader's buffer. Values that come in the wanted type and order are
copied from there to their rows of the weight; all others are copied to room beside and unpacked, converted, or moved on
the device.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

import torch

from tokenspeed.weights.driver_calls import driver_calls
from tokenspeed.weights.packed import Weight
from tokenspeed.weights.parts import ALIGNMENT, Part, line_bytes, parts_of, plain_dtype
from tokenspeed.weights.staging import Lane, OpenFiles, Target, Times
from tokenspeed.weights.tasks import usable_cores

READERS = 12
BUFFER_BYTES = 8 << 20
"""Each reader has two."""
AHEAD_BYTES = 512 << 20
"""Of packed weights whose reading is asked for before those in front of them are there."""
_REPORTS = 200
"""Most calls of a load's `progress`."""

Placed = Iterator[tuple[str, torch.Tensor]]


def read_to(
    device: torch.device,
    weights: Mapping[str, Weight],
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
    readers: int = READERS,
    buffer_bytes: int = BUFFER_BYTES,
    times: Times | None = None,
) -> Placed:
    """Every weight, by its name and in order, on `device`: matrices in `dtype`, vectors in float32, of their shapes.

    Weights to come are being read meanwhile, as far as AHEAD_BYTES. What is on the device already is a view where its
    type is right. progress: packed bytes done and in all, 0 at first. times: to which those of the readers are added.
    Raises FormatError where a file changes meanwhile.
    """
    readers = max(1, min(readers, usable_cores()))
    total = sum(weight.nbytes for weight in weights.values())
    with _Readers(device, readers, max(buffer_bytes, _widest(weights) + ALIGNMENT)) as pool:
        source, waiting = iter(weights.items()), deque[_Weight]()
        done = told = ahead = 0
        if progress is not None:
            progress(0, total)
        while True:
            while (not waiting or ahead < AHEAD_BYTES) and (following := next(source, None)) is not None:
                ahead += following[1].nbytes if waiting else 0
                waiting.append(pool.start(*following, dtype))
            if not waiting:
                break
            first = waiting.popleft()
            ahead -= waiting[0].nbytes if waiting else 0
            pool.finish(first)
            done += first.nbytes
            if progress is not None and done - told >= min(total // _REPORTS, total - told):
                told = done
                progress(done, total)
            yield first.name, first.tensor
        if times is not None:
            pool.add_times(times)


@dataclass
class _Weight:
    """A weight on its way in so many parts. lanes: of those that have been sent."""

    name: str
    tensor: torch.Tensor
    nbytes: int
    parts: int = 0
    lanes: list[Lane] = field(default_factory=list)
    sent: threading.Event = field(default_factory=threading.Event)


_Job = tuple[Part, _Weight, Target, torch.cuda.Event | None]


class _Readers:
    """Threads that read parts of weights, each with a lane of its own."""

    def __init__(self, device: torch.device, count: int, nbytes: int) -> None:
        self._device, self._nbytes = device, nbytes
        calls = driver_calls(device)
        self._lanes = [Lane(device, nbytes, calls) for _ in range(count)]
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._files = OpenFiles()
        self._error: BaseException | None = None
        self._threads = [threading.Thread(target=self._read, args=(lane,), daemon=True) for lane in self._lanes]
        for thread in self._threads:
            thread.start()

    def start(self, name: str, weight: Weight, dtype: torch.dtype) -> _Weight:
        """Make room for a weight and ask for all its parts."""
        kept = torch.float32 if weight.spec.kind == "vector" else dtype
        if all(segment.data.device.type == "cuda" for segment in weight.segments):
            return _Weight(name, _as_it_lies(weight, kept).to(self._device), weight.nbytes)
        made = torch.empty(weight.shape, dtype=kept, device=self._device)
        # The memory may have been another tensor's until now.
        ready = torch.cuda.current_stream(self._device).record_event() if made.is_cuda else None
        flat = made.view(-1).view(torch.uint8)
        target = Target(flat, flat.data_ptr())
        parts = list(parts_of(weight, made.view(-1, weight.spec.cols), self._nbytes))
        started = _Weight(name, made, weight.nbytes, len(parts))
        for part in parts:
            self._jobs.put((part, started, target, ready))
        return started

    def finish(self, weight: _Weight) -> None:
        """Wait until all of it is on its way, and let the current stream wait for that. Raises a reader's error."""
        if not weight.parts:
            return
        weight.sent.wait()
        if self._error is not None:
            raise self._error
        if weight.tensor.is_cuda:
            stream = torch.cuda.current_stream(self._device)
            for lane in set(weight.lanes):
                lane.follow(stream)

    def _read(self, lane: Lane) -> None:
        entered = False
        while (job := self._jobs.get()) is not None:
            part, weight, target, ready = job
            try:
                if not entered:
                    lane.enter()
                    entered = True
                if self._error is None:
                    part.run(lane, self._files, target, ready)
            except BaseException as error:  # whoever waits raises it
                self._error = error
            weight.lanes.append(lane)
            if self._error is not None or len(weight.lanes) == weight.parts:
                weight.sent.set()

    def add_times(self, times: Times) -> None:
        """Add what the readers spent."""
        for lane in self._lanes:
            times.add(lane.times)

    def __enter__(self) -> _Readers:
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(Empty):  # what nobody waits for
            while True:
                self._jobs.get_nowait()
        for _thread in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()
        for lane in self._lanes:
            lane.finish()  # nobody else knows of copies under way
        self._files.close()


def _as_it_lies(weight: Weight, dtype: torch.dtype) -> torch.Tensor:
    """A weight unpacked on its own device; a view where it is of that type already."""
    only = weight.segments[0]
    if len(weight.segments) == 1 and plain_dtype(only) == dtype:
        return only.data.view(dtype).view(weight.shape)
    return weight.unpacked(dtype)


def _widest(weights: Mapping[str, Weight]) -> int:
    return max((line_bytes(segment) for weight in weights.values() for segment in weight.segments), default=0)
