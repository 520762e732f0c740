"""Runs step plans on a GPU without waiting: the host writes a header, a captured step reads it, runs and writes tokens
where the host looks for them. Of a decoding step nothing but its graph is given to the device.

Sampled tokens are fed back on the device, so the next step is launched before they are known here. Rows that ask for
log-probabilities, for more than a slot of the sampler holds, or for logits processors, and what sequences give in place
of tokens, make their step wait and go the plain way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch

from tokenspeed.contracts.step import NewSequence, ResultRow, StepDelta, StepPlan, StepResult
from tokenspeed.kernels.cuda.attend import reach_of
from tokenspeed.kernels.triton.sampling_state import excess, is_edited
from tokenspeed.kernels.triton.step import StepInputs
from tokenspeed.kernels.triton.view import Reach
from tokenspeed.program.plan import bucket_of
from tokenspeed.runner.arena import Arena
from tokenspeed.runner.edits import has_penalties
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.graphs import Device, Graphs
from tokenspeed.runner.gpu.host import Changes, HostSlots, LaunchedRow
from tokenspeed.runner.gpu.invariant_jobs import run_invariant_jobs
from tokenspeed.runner.gpu.link import TritonSteps
from tokenspeed.runner.gpu.ring import SharedMemory, StepRing
from tokenspeed.runner.gpu.state import DeviceState, StateShape
from tokenspeed.runner.gpu.view import GpuView
from tokenspeed.runner.inputs import wanted_rows
from tokenspeed.runner.jobs import Job, jobs_at_once, jobs_of, run_jobs
from tokenspeed.runner.pooling import with_pooled
from tokenspeed.runner.processors import LogitsProcessors

DEPTH = 2
"""Steps under way: one runs while the host prepares the next."""
FEW_ROWS = (1, 8, 64)
"""Steps that feed prompts are captured for so many rows or for all: empty rows take time in every layer."""
PAIRS = 1024
"""Words of state that a header changes; what is more goes ahead by a copy."""
Entries = tuple[np.ndarray, np.ndarray]


class Link(SharedMemory, Protocol):
    """What the device offers beyond torch: recording, shared memory, and marks to wait for."""

    @property
    def recorder(self) -> Device: ...

    def staged(self, data: torch.Tensor) -> torch.Tensor:
        """The same data on the host, from where a copy to the device runs beside the host."""
        ...


@dataclass
class Launched:
    """The handle of a step: its number in the ring where its tokens will be, and its rows."""

    step_id: int
    rows: list[LaunchedRow]
    ring: StepRing
    number: int
    found: StepResult | None = None

    def result(self) -> StepResult:
        """The tokens, when the device is done with them. Steps are asked in the order of their launch. Raises
        DeviceError."""
        if self.found is None:
            rows = []
            for row, token in zip(self.rows, self.ring.wait(self.number, len(self.rows)), strict=True):
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
        self._ring = StepRing(link, max_num_seqs, PAIRS, self.device)
        self.graphs = Graphs(link.recorder, graphs)
        self._pending: deque[Launched] = deque(maxlen=DEPTH + 1)

    def launch(self, plan: StepPlan) -> Launched:
        """Start the step."""
        try:
            with torch.inference_mode():
                return self._launch(plan)
        except BaseException:
            self._ring.lose()
            self._pending.clear()  # nobody may build on what was under way
            raise

    @torch.inference_mode()
    def repeatable(self, plan: StepPlan) -> Callable[[], None]:
        """Run a step whose rows are known to the device, and give what runs its graphs once more from where the device
        is then: for measurements. Rows go on up to their `num_reserved`; the host does not follow, so free the slots
        afterwards. Raises RuntimeError where the delta is not empty, or the step not captured."""
        if plan.delta != StepDelta():
            raise RuntimeError("a step that brings changes would bring them again")
        launched = self.launch(plan)
        launched.result()
        kind = _Kind.of(launched.rows, self._max_rows)
        self._ring.repeat([row.num_reserved for row in plan.rows])

        def run() -> None:
            self.graphs.replay(kind)
            self._ring.skip()

        return run

    def wrap_kernels(self, wrap: Callable[[TritonSteps], TritonSteps]) -> None:
        """Put something around the kernels before and after the forward pass: for measurements. Steps are captured
        anew."""
        self._kernels = wrap(self._kernels)
        self.graphs.forget()

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
        launched = Launched(plan.step_id, rows, self._ring, self._upload(changes, rows))
        if any(_needs_logits(row) for row in rows):
            self._step_by_logits(launched)
        else:
            kind = _Kind.of(rows, self._max_rows)
            self.graphs.run(kind, lambda: self._step(kind))
        self._pending.append(launched)
        return launched

    def _step(self, kind: _Kind) -> None:
        """All of a step, from its header to its tokens, on whatever the ring's next slot holds."""
        sampling, lengths = self.state.sampling, self.state.lengths
        inputs, view = self._prepare(kind)
        logits = self.backend.forward(view)
        drawn = self._kernels.sample(logits, inputs, sampling, lengths.pool, kind.edits)
        self._kernels.finish(drawn, inputs, lengths, sampling, self._ring.mailbox)

    def _prepare(self, kind: _Kind) -> tuple[StepInputs, GpuView]:
        mailbox = self._ring.mailbox
        inputs = self._kernels.prepare(mailbox, self.state.flat, self.state.lengths, kind.bucket, kind.rows)
        return inputs, self._view(inputs, kind)

    def _step_by_logits(self, launched: Launched) -> None:
        """Wait until all tokens are known, then forward, score and sample as the reference does."""
        for before in self._pending:
            before.result()
        rows = launched.rows
        inputs, view = self._prepare(
            _Kind.of(rows, self._max_rows)._replace(mixed=True, decodes=True, reach=Reach.UNEVEN)
        )
        wanted = torch.tensor(wanted_rows(rows), dtype=torch.int32, device=self.device)
        values = self.backend.body(view)
        results = [ResultRow(row.number, row.start + row.count, [], [], []) for row in rows]
        jobs = [job for row, result in zip(rows, results, strict=True) for job in jobs_of(row, result)]
        at_once = jobs_at_once(self.backend.vocab_size)
        for first in range(0, len(jobs), at_once):
            part = slice(first, first + at_once)
            self._run_jobs(self.backend.head(view.asking(wanted[part]), dict(values)), jobs[part])
        results = with_pooled(
            rows,
            results,
            lambda places: self.backend.hidden(self._at(view, places), dict(values)).float(),
            lambda places: self.backend.head(self._at(view, places), dict(values)).float(),
            at_once,
        )
        drawn = torch.zeros(len(inputs.row_slots), dtype=torch.int32)
        for at, result in enumerate(results):
            drawn[at] = result.token_ids[0] if result.token_ids else -1
        lengths, sampling = self.state.lengths, self.state.sampling
        self._kernels.finish(drawn.to(self.device), inputs, lengths, sampling, self._ring.mailbox)
        launched.found = StepResult(launched.step_id, results)

    def _at(self, view: GpuView, places: list[int]) -> GpuView:
        return view.asking(torch.tensor(places, dtype=torch.int32, device=self.device))

    def _run_jobs(self, logits: torch.Tensor, jobs: list[Job]) -> None:
        if self.backend.batch_invariant:
            sampling, pool = self.state.sampling, self.state.lengths.pool
            run_invariant_jobs(logits, jobs, self._kernels, sampling, pool, self.processors)
        else:
            run_jobs(logits.float(), jobs, self.processors)

    def _view(self, inputs: StepInputs, kind: _Kind) -> GpuView:
        shape, header = self._arena.shape, self._ring.mailbox.rows
        items, decode_rows = self._kernels.items(inputs, header, self._arena, kind.mixed, kind.decodes)
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
            one_each=not kind.mixed,
            reach=kind.reach,
        )

    def _upload(self, changes: Changes, rows: Sequence[LaunchedRow]) -> int:
        """Tell what changed and the rows; what finds no place in a header goes ahead of it. The step's number."""
        for new in changes.new:
            ids = self._link.staged(torch.from_numpy(np.array(new.token_ids, np.int32)))
            self.state.lengths.pool[new.slot, : len(ids)].copy_(ids, non_blocking=True)
        entries = [self.state.table_entries(*table) for table in changes.tables]
        entries += [self.state.sequence_entries(new) for new in changes.new]
        indices, values = _joined(entries)
        if len(indices) > PAIRS:
            self._write(indices[PAIRS:], values[PAIRS:])
        if any(has_penalties(new.sampling) for new in changes.new):
            self._count(changes.new)
        fed = [(row.number, row.count, row.offset, row.start + row.count) for row in rows]
        return self._ring.post(fed, indices[:PAIRS], values[:PAIRS])

    def _write(self, indices: np.ndarray, values: np.ndarray) -> None:
        """Change words of the state by copies, without waiting."""
        pair = (self._link.staged(torch.from_numpy(each)) for each in (indices.astype(np.int64), values))
        at, new = (each.to(self.device, non_blocking=True) for each in pair)
        self.state.flat.index_copy_(0, at, new)

    def _count(self, sequences: list[NewSequence]) -> None:
        """Count the tokens of sequences with penalties, once their lengths are on the device."""
        penalized = [new for new in sequences if has_penalties(new.sampling)]
        if self.state.sampling.counts is None:
            self.state.sampling = self.state.sampling.with_counts(self.backend.vocab_size)
            self.graphs.forget()  # captured steps do not know the counts
        counts = self.state.sampling.counts
        assert counts is not None
        slots, prompts, known = (
            torch.tensor(column, dtype=torch.int32, device=self.device)
            for column in zip(*((new.slot, new.num_prompt, len(new.token_ids)) for new in penalized), strict=True)
        )
        self.state.lengths.num_tokens[slots.long()] = known
        self._kernels.count_tokens(slots, prompts, self.state.lengths, counts)


class _Kind(NamedTuple):
    """What tells captured steps apart. bucket, rows: tokens and rows that there is room for. mixed: some rows feed more
    than one token. decodes: others of a mixed step feed one. reach: of the sequences where all do. edits: some edit
    their logits."""

    bucket: int
    rows: int
    mixed: bool
    decodes: bool
    reach: Reach
    edits: bool

    @staticmethod
    def of(rows: Sequence[LaunchedRow], max_rows: int) -> _Kind:
        """The kind of a step of these rows, of which there may be `max_rows`."""
        bucket, mixed = bucket_of(sum(row.count for row in rows)), any(row.count > 1 for row in rows)
        room = next((few for few in FEW_ROWS if len(rows) <= few), max_rows) if mixed else max_rows
        return _Kind(
            bucket,
            min(room, bucket, max_rows),
            mixed,
            mixed and any(row.count == 1 for row in rows),
            Reach.UNEVEN if mixed else reach_of([row.start for row in rows]),
            any(is_edited(row.slot.sampling) for row in rows),
        )


def _joined(entries: list[Entries]) -> Entries:
    if not entries:
        return np.empty(0, np.int32), np.empty(0, np.int32)
    indices, values = zip(*entries, strict=True)
    return np.concatenate(indices), np.concatenate(values)


def _needs_logits(row: LaunchedRow) -> bool:
    """Whether a row asks for what the captured sampler does not do."""
    sampling, pooling = row.slot.sampling, row.slot.pooling
    if pooling is not None and (pooling.mean or row.pools):
        return True
    told = sampling.logprobs >= 0 or sampling.prompt_logprobs >= 0
    return told or sampling.masked or bool(sampling.processors) or excess(sampling) is not None
