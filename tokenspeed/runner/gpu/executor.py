"""Runs step plans on a GPU without waiting: a header goes in, a captured step runs, tokens come back later.

Sampled tokens are fed back on the device, so the next step is launched before they are known here. Rows that ask for
log-probabilities, for more than a slot of the sampler holds, or for logits processors make their step wait and go the
plain way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from tokenspeed.contracts.step import NewSequence, ResultRow, StepDelta, StepPlan, StepResult
from tokenspeed.kernels.triton.sampling_state import excess, is_edited
from tokenspeed.kernels.triton.step import write_header
from tokenspeed.program.plan import bucket_of
from tokenspeed.runner.arena import Arena
from tokenspeed.runner.edits import has_penalties
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.graphs import Device, Graphs
from tokenspeed.runner.gpu.host import Changes, HostSlots, LaunchedRow
from tokenspeed.runner.gpu.invariant_jobs import run_invariant_jobs
from tokenspeed.runner.gpu.link import TritonSteps
from tokenspeed.runner.gpu.state import DeviceState, StateShape
from tokenspeed.runner.gpu.view import GpuView
from tokenspeed.runner.inputs import wanted_rows
from tokenspeed.runner.jobs import Job, jobs_at_once, jobs_of, run_jobs
from tokenspeed.runner.processors import LogitsProcessors

DEPTH = 2
"""Steps under way: one runs while the host prepares the next."""
PAIRS = 1024
"""Words of state that one header changes; more take further headers."""
Entries = tuple[np.ndarray, np.ndarray]


class Link(Protocol):
    """What the device offers beyond torch: recording, pinned memory, and marks to wait for."""

    @property
    def recorder(self) -> Device: ...

    def pinned(self, *shape: int) -> torch.Tensor:
        """Host memory, int32, that copies run from and to beside the host."""
        ...

    def mark(self) -> Callable[[], None]:
        """A point in the work given so far; calling it waits until that is done."""
        ...


@dataclass
class Launched:
    """The handle of a step: its rows, where its tokens will lie, and how to wait for them."""

    step_id: int
    rows: list[LaunchedRow]
    tokens: torch.Tensor
    wait: Callable[[], None]
    found: StepResult | None = None

    def result(self) -> StepResult:
        """The tokens, when the device is done with them. Steps are asked in the order of their launch."""
        if self.found is None:
            self.wait()
            rows = []
            for row, (token, _) in zip(self.rows, self.tokens[: len(self.rows)].tolist(), strict=True):
                if row.samples:
                    row.slot.append(token)
                rows.append(ResultRow(row.number, row.start + row.count, [token] if row.samples else []))
            self.found = StepResult(self.step_id, rows)
        return self.found


class GpuExecutor:
    """One GPU. `max_num_seqs`: most rows of a step. `max_len`: most tokens of a sequence."""

    max_in_flight = DEPTH

    def __init__(
        self,
        backend: GpuBackend,
        arena: Arena,
        kernels: TritonSteps,
        link: Link,
        *,
        max_num_seqs: int,
        max_len: int,
        graphs: bool = True,
    ) -> None:
        shape = arena.shape
        groups, pages = len(shape.layout.windows), -(-max_len // shape.page_size)
        self.backend, self._arena, self._kernels, self._link = backend, arena, kernels, link
        self.device = backend.model.device
        self.state = DeviceState(StateShape(max_num_seqs, groups, pages, max_len), self.device)
        self._slots = HostSlots(groups, shape.page_size)
        self.processors = LogitsProcessors()
        self._max_rows = max_num_seqs
        words = 2 + 4 * max_num_seqs + 2 * PAIRS
        self._header = torch.zeros(words, dtype=torch.int32, device=self.device)
        self._staging = [(link.pinned(words), link.pinned(max_num_seqs, 2)) for _ in range(DEPTH + 1)]
        self._turn = 0
        self._steps: dict[tuple[int, bool], _Step] = {}
        self.graphs = Graphs(link.recorder, graphs)
        self._pending: deque[Launched] = deque(maxlen=DEPTH + 1)

    def launch(self, plan: StepPlan) -> Launched:
        """Start the step."""
        with torch.inference_mode():
            return self._launch(plan)

    @torch.inference_mode()
    def repeatable(self, plan: StepPlan) -> Callable[[], None]:
        """Run a step whose rows are known to the device, and give what runs its graphs once more from where the device
        is then: for measurements. Rows go on up to their `num_reserved`; the host does not follow, so free the slots
        afterwards. Raises RuntimeError where the delta is not empty, or the step not captured."""
        if plan.delta != StepDelta():
            raise RuntimeError("a step that brings changes would bring them again")
        launched = self.launch(plan)
        launched.result()
        kind = _Kind.of(launched.rows)
        reserved = torch.tensor([row.num_reserved for row in plan.rows], dtype=torch.int32)
        self._header[4 : 4 + 4 * len(reserved) : 4].copy_(reserved)

        def run() -> None:
            self.graphs.replay(kind.forward)
            self.graphs.replay(kind.sample)

        return run

    def wrap_kernels(self, wrap: Callable[[TritonSteps], TritonSteps]) -> None:
        """Put something around the kernels before and after the forward pass: for measurements. Steps are captured
        anew."""
        self._kernels = wrap(self._kernels)
        self.graphs.forget()
        self._steps.clear()

    def sleep(self) -> None:
        """Give back the memory of the pages; captured steps stay, as addresses do."""
        self._link.mark()()
        self._arena.sleep()

    def wake(self) -> None:
        """Take it again."""
        self._arena.wake()

    def close(self) -> None:
        """Wait for what runs and release the pages; other memory goes with the objects."""
        self._link.mark()()
        self._arena.close()

    def _launch(self, plan: StepPlan) -> Launched:
        self.graphs.begin_step()
        for copies in plan.delta.copies:
            self._arena.copy(copies.pages)
        changes = self._slots.apply(plan)
        rows = self._slots.launch(plan.rows)
        header, results = self._staging[self._turn]
        self._turn = (self._turn + 1) % len(self._staging)
        self._upload(header, changes, rows)
        if any(_needs_logits(row) for row in rows):
            launched = self._step_by_logits(plan.step_id, rows)
        else:
            launched = self._step(plan.step_id, rows, results)
        self._pending.append(launched)
        return launched

    def _step(self, step_id: int, rows: list[LaunchedRow], results: torch.Tensor) -> Launched:
        kind = _Kind.of(rows)
        bucket, mixed, edits = kind
        step = self._steps.setdefault((bucket, mixed), _Step(bucket, min(bucket, self._max_rows), mixed))
        self.graphs.run(kind.forward, lambda: self._forward(step))
        self.graphs.run(kind.sample, lambda: self._sample(step, edits))
        results[: step.rows].copy_(step.result[edits], non_blocking=True)
        return Launched(step_id, rows, results, self._link.mark())

    def _prepare(self, step: _Step) -> GpuView:
        step.inputs = self._kernels.prepare(self._header, self.state.flat, self.state.lengths, step.tokens, step.rows)
        return self._view(step)

    def _forward(self, step: _Step) -> None:
        step.logits = self.backend.forward(self._prepare(step))

    def _sample(self, step: _Step, edits: bool) -> None:
        sampling, lengths = self.state.sampling, self.state.lengths
        drawn = self._kernels.sample(step.logits, step.inputs, sampling, lengths.pool, edits)
        step.result[edits] = self._kernels.finish(drawn, step.inputs, lengths, sampling)

    def _step_by_logits(self, step_id: int, rows: list[LaunchedRow]) -> Launched:
        """Wait until all tokens are known, then forward, score and sample as the reference does."""
        for launched in self._pending:
            launched.result()
        bucket = bucket_of(sum(row.count for row in rows))
        step = _Step(bucket, min(bucket, self._max_rows), mixed=True)
        view = self._prepare(step)
        wanted = torch.tensor(wanted_rows(rows), dtype=torch.int32, device=self.device)
        values = self.backend.body(view)
        results = [ResultRow(row.number, row.start + row.count, [], [], []) for row in rows]
        jobs = [job for row, result in zip(rows, results, strict=True) for job in jobs_of(row, result)]
        at_once = jobs_at_once(self.backend.vocab_size)
        for first in range(0, len(jobs), at_once):
            part = slice(first, first + at_once)
            self._run_jobs(self.backend.head(view.asking(wanted[part]), dict(values)), jobs[part])
        drawn = torch.zeros(step.rows, dtype=torch.int32)
        for at, result in enumerate(results):
            drawn[at] = result.token_ids[0] if result.token_ids else -1
        self._kernels.finish(drawn.to(self.device), step.inputs, self.state.lengths, self.state.sampling)
        return Launched(step_id, rows, drawn, lambda: None, StepResult(step_id, results))

    def _run_jobs(self, logits: torch.Tensor, jobs: list[Job]) -> None:
        if self.backend.batch_invariant:
            sampling, pool = self.state.sampling, self.state.lengths.pool
            run_invariant_jobs(logits, jobs, self._kernels, sampling, pool, self.processors)
        else:
            run_jobs(logits.float(), jobs, self.processors)

    def _view(self, step: _Step) -> GpuView:
        shape, inputs = self._arena.shape, step.inputs
        items, decode_rows = self._kernels.items(inputs, self._header, self._arena, step.mixed)
        return GpuView(
            tokens=inputs.tokens,
            positions=inputs.positions,
            slots=inputs.slots,
            rows=inputs.sample_rows,
            block_tables=self.state.block_tables,
            kv=self._arena.kv,
            places=shape.layout.places,
            page_size=shape.page_size,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            items=items,
            decode_rows=decode_rows,
        )

    def _upload(self, header: torch.Tensor, changes: Changes, rows: Sequence[LaunchedRow]) -> None:
        """Send what changed and the rows. What finds no place in one header goes ahead in others without rows."""
        for new in changes.new:
            ids = torch.tensor(new.token_ids, dtype=torch.int32)
            self.state.lengths.pool[new.slot, : len(ids)].copy_(ids)
        entries = [self.state.table_entries(*table) for table in changes.tables]
        entries += [self.state.sequence_entries(new) for new in changes.new]
        indices, values = _joined(entries)
        while len(indices) > PAIRS:
            self._send(torch.zeros_like(header), [], indices[:PAIRS], values[:PAIRS])
            self._kernels.prepare(self._header, self.state.flat, self.state.lengths, 1, 1)
            indices, values = indices[PAIRS:], values[PAIRS:]
        self._send(header, rows, indices, values)
        if any(has_penalties(new.sampling) for new in changes.new):
            self._count(changes.new)

    def _send(self, header: torch.Tensor, rows: Sequence[LaunchedRow], indices: np.ndarray, values: np.ndarray) -> None:
        fed = [(row.number, row.count, row.offset, row.start + row.count) for row in rows]
        end = write_header(header.numpy(), fed, indices, values)
        self._header[:end].copy_(header[:end], non_blocking=True)

    def _count(self, sequences: list[NewSequence]) -> None:
        """Count the tokens of sequences with penalties, once their lengths are on the device."""
        penalized = [new for new in sequences if has_penalties(new.sampling)]
        if self.state.sampling.counts is None:
            self.state.sampling = self.state.sampling.with_counts(self.backend.vocab_size)
            self.graphs.forget()  # captured steps do not know the counts
            self._steps.clear()
        counts = self.state.sampling.counts
        assert counts is not None
        slots, prompts, known = (
            torch.tensor(column, dtype=torch.int32, device=self.device)
            for column in zip(*((new.slot, new.num_prompt, len(new.token_ids)) for new in penalized), strict=True)
        )
        self.state.lengths.num_tokens[slots.long()] = known
        self._kernels.count_tokens(slots, prompts, self.state.lengths, counts)


class _Kind(NamedTuple):
    """What tells captured steps apart. mixed: some rows feed more than one token. edits: some edit their logits."""

    bucket: int
    mixed: bool
    edits: bool

    @staticmethod
    def of(rows: Sequence[LaunchedRow]) -> _Kind:
        """The kind of a step of these rows."""
        edits = any(is_edited(row.slot.sampling) for row in rows)
        return _Kind(bucket_of(sum(row.count for row in rows)), any(row.count > 1 for row in rows), edits)

    @property
    def forward(self) -> object:
        """The forward pass's graph."""
        return ("forward", self.bucket, self.mixed)

    @property
    def sample(self) -> object:
        """The sampling's graph."""
        return ("sample", *self)


class _Step:
    """Tensors of a bucket: those of its captured step, or of the last eager one. mixed: some rows feed more than one
    token."""

    def __init__(self, tokens: int, rows: int, mixed: bool) -> None:
        self.tokens, self.rows, self.mixed = tokens, rows, mixed
        self.inputs: Any = None
        self.logits = torch.empty(0)
        self.result: dict[bool, torch.Tensor] = {}


def _joined(entries: list[Entries]) -> Entries:
    if not entries:
        return np.empty(0, np.int32), np.empty(0, np.int32)
    indices, values = zip(*entries, strict=True)
    return np.concatenate(indices), np.concatenate(values)


def _needs_logits(row: LaunchedRow) -> bool:
    """Whether a row asks for what the captured sampler does not do."""
    sampling = row.slot.sampling
    told = sampling.logprobs >= 0 or sampling.prompt_logprobs >= 0
    return told or sampling.masked or bool(sampling.processors) or excess(sampling) is not None
