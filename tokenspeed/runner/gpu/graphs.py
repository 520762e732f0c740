"""Steps captured once per bucket and replayed. Capture is lazy and bounded per step; until then a step is eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

CAPTURES_PER_STEP = 1
"""Captures cost tens of milliseconds, and others wait for their tokens."""
RUNS_BEFORE_CAPTURE = 1
"""Eager runs of a bucket first: they compile its kernels and set up its libraries, which a capture must not do."""


class Replay(Protocol):
    """Something that was recorded."""

    def replay(self) -> None:
        """Run it again, on the same memory."""
        ...


class Device(Protocol):
    """How work is recorded: a GPU's streams and graphs, or a stand-in for tests."""

    def capture(self, work: Callable[[], None]) -> Replay:
        """Record the work without running it."""
        ...

    def forget(self) -> None:
        """All that was recorded is gone."""
        ...


class CudaDevice:
    """Records CUDA graphs that share one pool of memory: replays never overlap."""

    def __init__(self) -> None:
        self._pool: Any = None

    def capture(self, work: Callable[[], None]) -> Replay:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        self._pool = self._pool or graph.pool()
        return graph

    def forget(self) -> None:
        self._pool = None


class Graphs:
    """The captured steps by bucket."""

    def __init__(self, device: Device, enabled: bool = True) -> None:
        self._device = device
        self._enabled = enabled
        self._replays: dict[object, Replay] = {}
        self._eager_runs: dict[object, int] = {}
        self._left = CAPTURES_PER_STEP

    def begin_step(self) -> None:
        """A new step may capture again."""
        self._left = CAPTURES_PER_STEP

    def run(self, key: object, work: Callable[[], None]) -> None:
        """Do the work of `key`: by its graph, or by a capture and then its graph, or eagerly."""
        replay = self._replays.get(key)
        if replay is None and self._may_capture(key):
            replay = self._replays[key] = self._device.capture(work)
            self._left -= 1
        if replay is not None:
            return replay.replay()
        self._eager_runs[key] = self._eager_runs.get(key, 0) + 1
        work()

    def replay(self, key: object) -> None:
        """Run the graph of `key` once more: for measurements. Raises RuntimeError where it has none."""
        if key not in self._replays:
            raise RuntimeError(f"{key} has no graph (captured: {list(self._replays)})")
        self._replays[key].replay()

    def captured(self) -> list[object]:
        """Keys that have a graph."""
        return list(self._replays)

    def forget(self) -> None:
        """Drop all graphs: what they read or write has moved."""
        self._replays.clear()
        self._eager_runs.clear()
        self._device.forget()

    def _may_capture(self, key: object) -> bool:
        return self._enabled and self._left > 0 and self._eager_runs.get(key, 0) >= RUNS_BEFORE_CAPTURE
