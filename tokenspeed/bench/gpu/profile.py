"""Takes profiles of decode steps on a GPU for `waterfall`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch.profiler import ProfilerActivity, profile

from tokenspeed.bench.gpu.bare import executor_of, sequences_of
from tokenspeed.bench.gpu.decode import timed_ms
from tokenspeed.bench.gpu.stamps import FIRST, Ring, stamp_kernel
from tokenspeed.bench.gpu.waterfall import Label, Launch, Waterfall, labels_between, middle_steps, role, waterfall
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.engine.llm import LLM
from tokenspeed.program.plan import Planned
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.view import GpuView

BEFORE, AFTER = "prepare", "sample"
"""What is around the ops of a step."""
Profiler = Callable[[Callable[[], object]], Sequence[Launch]]
MARK = stamp_kernel.fn.__name__


def per_op(llm: LLM, batch: int, context: int, tokens: int, draws: bool = False) -> Waterfall:
    """The table of a decode step, as `LLM.generate` runs it. The engine has to be idle; its graphs are captured anew.

    Raises UnsupportedError where steps are not captured, ValueError for fewer tokens than the table averages over.
    """
    return _table(llm, launch_order(llm, batch, context, draws), batch, context, tokens, draws)


def per_record(llm: LLM, batch: int, context: int, tokens: int) -> tuple[list[Planned], Waterfall]:
    """The records of a decode step in the order they run in, and the same table with their numbers as ops. Raises as
    `per_op`, and UnsupportedError where the graph's kernels cannot be told apart."""
    walked: list[Planned] = []

    def numbered(step: Planned) -> str:
        walked.append(step)
        return str(len(walked) - 1)

    labels = launch_order(llm, batch, context, profiler=profiled, name=numbered)
    found = _table(llm, labels, batch, context, tokens, False)
    if found.unlike:
        raise UnsupportedError(f"the graph's kernels are not those of the step as it was walked: {found.unlike}")
    return walked, found


def _table(llm: LLM, labels: Sequence[Label], batch: int, context: int, tokens: int, draws: bool) -> Waterfall:
    for count in (3, tokens):
        timed_ms(llm, batch, context, count, draws)
    before, steps = middle_steps(profiled(lambda: timed_ms(llm, batch, context, tokens, draws)))
    return waterfall(before, steps, labels)


def profiled(run: Callable[[], object]) -> list[Launch]:
    """What the device did, in order of start."""
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        run()
        torch.cuda.synchronize()
    cuda = torch.autograd.DeviceType.CUDA  # type: ignore[attr-defined]
    events = [event for event in found.events() or () if event.device_type == cuda]
    launches = [Launch(event.name, event.time_range.start, event.time_range.end) for event in events]
    return sorted(launches, key=lambda launch: launch.start)


def launch_order(
    llm: LLM,
    batch: int,
    context: int,
    draws: bool = False,
    profiler: Profiler = profiled,
    name: Callable[[Planned], str] | None = None,
) -> list[Label]:
    """The kernels of a decode step and what launches each: one eager step with a mark before every op. name: of a
    record, by default its role."""
    executor, sequences = executor_of(llm), sequences_of(llm, batch, context, 2, draws)
    executor.launch(sequences.enter(0)).result()  # compiles what this step needs
    ring = Ring(executor.device)
    ring.stamp(FIRST)
    executor.graphs.forget()  # the next step of this kind is eager
    with marked(executor.backend, ring, name or _role) as ops:
        launches = profiler(lambda: executor.launch(sequences.go_on(1)).result())
    executor.launch(sequences.leave(2)).result()
    return labels_between(launches, MARK, ops)


@contextmanager
def marked(backend: GpuBackend, ring: Ring, name: Callable[[Planned], str]) -> Iterator[list[str]]:
    """Inside, walks launch a mark before every record and one at their end; the list gets what follows each."""
    walk, ops = backend.walk, [BEFORE]

    def marking(steps: Sequence[Planned], view: GpuView, values: dict[int, torch.Tensor]) -> None:
        for step in steps:
            ops.append(name(step))
            ring.stamp(FIRST)
            walk([step], view, values)
        ops.append(AFTER)
        ring.stamp(FIRST)

    backend.walk = marking  # type: ignore[method-assign]
    try:
        yield ops
    finally:
        backend.walk = walk  # type: ignore[method-assign]


def _role(step: Planned) -> str:
    return role(step.record.op, step.record.weights)
