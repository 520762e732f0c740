"""A GPU that is not there: recorded work is kept and run again, on CPU tensors at the same addresses."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenspeed.engine.llm import LLM
from tokenspeed.kernels.registry import Implementation, Registry
from tokenspeed.ops import reference
from tokenspeed.program.program import Record
from tokenspeed.runner import build
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.executor import GpuExecutor
from tokenspeed.runner.gpu.link import TritonSteps
from tokenspeed.runner.gpu.view import GpuView

Tensors = Sequence[torch.Tensor]
SETTINGS: dict[str, Any] = {"dtype": "float32", "max_num_batched_tokens": 16, "block_size": 4, "max_num_seqs": 4}


@dataclass
class FakeGraph:
    work: Callable[[], None]
    replays: int = 0

    def replay(self) -> None:
        self.replays += 1
        self.work()


@dataclass
class FakeLink:
    """Runs everything at once."""

    graphs: list[FakeGraph] = field(default_factory=list)
    waits: int = 0

    @property
    def recorder(self) -> FakeLink:
        return self

    def capture(self, work: Callable[[], None]) -> FakeGraph:
        self.graphs.append(FakeGraph(work))
        return self.graphs[-1]

    def forget(self) -> None:
        self.graphs.clear()

    def pinned(self, *size: int) -> torch.Tensor:
        return torch.zeros(size, dtype=torch.int32)

    def staged(self, data: torch.Tensor) -> torch.Tensor:
        return data.clone()

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self.waits += 1

        return wait

    def idle(self) -> bool:
        return True


@dataclass
class LateGraph:
    link: LateLink
    work: Callable[[], None]

    def replay(self) -> None:
        self.link.queue.append(self.work)
        self.link.most = max(self.link.most, len(self.link.queue))


@dataclass
class LateLink(FakeLink):
    """Runs a captured step as late as it can: when the host has looked for a result in vain, or when a step is eager.

    Nothing that the host writes after a launch may matter to it, but for what the device is told to read then.
    """

    queue: deque[Callable[[], None]] = field(default_factory=deque)
    most: int = 0
    """Steps that were under way at once."""

    def capture(self, work: Callable[[], None]) -> Any:
        return LateGraph(self, work)

    def mark(self) -> Callable[[], None]:
        return self.drain

    def idle(self) -> bool:
        self._run_one()
        return not self.queue

    def drain(self) -> None:
        while self.queue:
            self._run_one()

    def _run_one(self) -> None:
        if self.queue:
            self.running = True
            try:
                self.queue.popleft()()
            finally:
                self.running = False

    running: bool = False


class LateSteps(TritonSteps):
    """The kernels around the forward pass; those of an eager step come after all that was launched before."""

    def __init__(self, kernels: TritonSteps, link: LateLink) -> None:
        self._inner, self._link = kernels, link
        self.items = kernels.items  # type: ignore[method-assign]

    def prepare(self, *args: Any, **options: Any) -> Any:
        if not self._link.running:
            self._link.drain()
        return self._inner.prepare(*args, **options)


def open_fake_gpu(monkeypatch: pytest.MonkeyPatch, model: Path, link: FakeLink, **settings: Any) -> LLM:
    """A model of float32 weights by the GPU's runner, on that link."""

    def choose(model: Any, *rest: Any) -> GpuBackend:
        return GpuBackend(model, register=register_twins)

    def executor(backend: GpuBackend, arena: Any, max_num_seqs: int, max_len: int) -> GpuExecutor:
        kernels = TritonSteps(backend.num_heads, 4)
        return GpuExecutor(backend, arena, kernels, link, max_num_seqs=max_num_seqs, max_len=max_len)

    with monkeypatch.context() as patch:
        patch.setattr(build, "choose_backend", choose)
        patch.setattr(build, "gpu_executor", executor)
        return LLM(str(model), **(SETTINGS | settings))


def register_twins(registry: Registry) -> None:
    """Ops that see the step, in torch, token by token."""
    for op, run in (("rope", _rope), ("kv_write", _kv_write), ("attention", _attention)):
        registry.add(Implementation("twin", op, "twin", run, lambda operands, situation: True, priority=5))


def _rope(view: GpuView, record: Record, inputs: Tensors, weights: Tensors) -> tuple[torch.Tensor, ...]:
    none = torch.empty(0)
    step = reference.StepView(none, view.positions.long(), none, [], [], [], (), none, none)
    return reference.rope(step, inputs, weights, record.attrs)


def _entry(view: GpuView, group: int, slot: int, position: int) -> tuple[int, int]:
    page = int(view.block_tables[group, slot, position // view.page_size])
    return page, position % view.page_size


def _kv_write(view: GpuView, record: Record, inputs: Tensors, weights: Tensors) -> tuple[torch.Tensor, ...]:
    group, index = view.places[record.attrs["layer"]]
    for t, slot in enumerate(view.slots.tolist()):
        if slot >= 0:
            page, offset = _entry(view, group, slot, int(view.positions[t]))
            for which, x in enumerate(inputs):
                view.kv[page, index, which, offset] = x[t].view(view.num_kv_heads, view.head_dim)
    return (inputs[0],)


def _attention(view: GpuView, record: Record, inputs: Tensors, weights: Tensors) -> tuple[torch.Tensor, ...]:
    attrs: Any = record.attrs
    group, index = view.places[attrs["layer"]]
    out = torch.zeros_like(inputs[0])
    for t, slot in enumerate(view.slots.tolist()):
        if slot < 0:
            continue
        position = int(view.positions[t])
        first = max(0, position - attrs["window"] + 1) if attrs["window"] else 0
        entries = [_entry(view, group, slot, p) for p in range(first, position + 1)]
        keys = torch.stack([view.kv[page, index, 0, offset] for page, offset in entries])
        values = torch.stack([view.kv[page, index, 1, offset] for page, offset in entries])
        q = inputs[0][t].view(attrs["kv_heads"], -1, attrs["head_dim"])
        scores = torch.einsum("hgd,nhd->hgn", q, keys.to(q.dtype)) * attrs["scale"]
        out[t] = torch.einsum("hgn,nhd->hgd", scores.softmax(-1), values.to(q.dtype)).reshape(-1)
    return (out,)
