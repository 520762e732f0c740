"""Runs step plans on a GPU without waiting: a packet goes in, a captured step runs, tokens come back later.

Sampled tokens are fed back on the device, so the next step is launched before they are known here. Rows that ask for
more than the captured sampler does (edits, penalties, log-probabilities) make their step wait and go the plain way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from tokenspeed.contracts.step import NewSequence, ResultRow, SamplingRow, StepPlan, StepResult
from tokenspeed.program.plan import bucket_of
from tokenspeed.runner.arena import Arena
from tokenspeed.runner.edits import has_penalties
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.graphs import Device, Graphs
from tokenspeed.runner.gpu.host import Changes, HostSlots, LaunchedRow
from tokenspeed.runner.gpu.state import HEADER, ROW, DeviceState, StateShape
from tokenspeed.runner.gpu.steps import StepBuffers, step_buffers
from tokenspeed.runner.gpu.view import GpuView
from tokenspeed.runner.inputs import wanted_rows
from tokenspeed.runner.jobs import jobs_of, run_jobs

DEPTH = 2
"""Steps under way: one runs while the host prepares the next."""
PAIRS = 1024
"""Words of state that one packet changes; more take further packets."""
_WORD = 0xFFFFFFFF


class StepKernels(Protocol):
    """The work around the forward pass; see `steps` for what each does."""

    scatter: Callable[[torch.Tensor, DeviceState, int], None]
    prepare: Callable[[torch.Tensor, DeviceState, StepBuffers], None]
    sample: Callable[[torch.Tensor, DeviceState, StepBuffers], torch.Tensor]
    finish: Callable[[torch.Tensor, DeviceState, StepBuffers], None]


class Link(Protocol):
    """What the device offers beyond torch: recording, pinned memory, and marks to wait for."""

    @property
    def recorder(self) -> Device: ...

    def pinned(self, size: int) -> torch.Tensor:
        """Host memory, int32 [size], that copies run from and to beside the host."""
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
            tokens = self.tokens.tolist()
            rows = []
            for row, token in zip(self.rows, tokens, strict=False):
                if row.samples:
                    row.slot.append(token)
                rows.append(ResultRow(row.number, row.start + row.count, [token] if row.samples else []))
            self.found = StepResult(self.step_id, rows)
        return self.found


class GpuExecutor:
    """One GPU. `max_num_seqs` rows and `max_tokens` tokens are the most of a step, `max_len` of a sequence."""

    max_in_flight = DEPTH

    def __init__(
        self,
        backend: GpuBackend,
        arena: Arena,
        kernels: StepKernels,
        link: Link,
        *,
        max_num_seqs: int,
        max_len: int,
        graphs: bool = True,
    ) -> None:
        shape = arena.shape
        self.backend, self._arena, self._kernels, self._link = backend, arena, kernels, link
        self._groups = len(shape.layout.windows)
        self._slots = HostSlots(self._groups, shape.page_size)
        pages = -(-max_len // shape.page_size)
        self.device = backend.model.device
        self.state = DeviceState(StateShape(max_num_seqs, self._groups, pages, max_len), self.device)
        self._max_rows = max_num_seqs
        self._packet = torch.zeros(HEADER + ROW * max_num_seqs + 2 * PAIRS, dtype=torch.int32, device=self.device)
        self._staging = [(link.pinned(len(self._packet)), link.pinned(max_num_seqs)) for _ in range(DEPTH + 1)]
        self._turn = 0
        self._buckets: dict[int, tuple[StepBuffers, GpuView]] = {}
        self._logits: dict[int, torch.Tensor] = {}
        self.graphs = Graphs(link.recorder, graphs)
        self._pending: deque[Launched] = deque(maxlen=DEPTH + 1)

    def launch(self, plan: StepPlan) -> Launched:
        """Start the step."""
        with torch.inference_mode():
            return self._launch(plan)

    def close(self) -> None:
        """Wait for what runs; memory goes with the objects."""
        self._link.mark()()

    def _launch(self, plan: StepPlan) -> Launched:
        self.graphs.begin_step()
        for copies in plan.delta.copies:
            self._arena.copy(copies.pages)
        changes = self._slots.apply(plan)
        for new in changes.new:
            self._write_prompt(new)
        rows = self._slots.launch(plan.rows)
        packet, tokens = self._staging[self._turn]
        self._turn = (self._turn + 1) % len(self._staging)
        self._upload(packet, changes, rows)
        if any(_needs_logits(row) for row in rows):
            step = self._step_by_logits(plan.step_id, rows)
        else:
            step = self._step(plan.step_id, rows, tokens)
        self._pending.append(step)
        return step

    def _step(self, step_id: int, rows: list[LaunchedRow], tokens: torch.Tensor) -> Launched:
        bucket = bucket_of(sum(row.count for row in rows))
        buffers, view = self._bucket(bucket)
        self.graphs.run(("forward", bucket), lambda: self._forward(buffers, view, bucket))
        self.graphs.run(("sample", bucket), lambda: self._sample(buffers, bucket))
        tokens[: len(buffers.result)].copy_(buffers.result, non_blocking=True)
        return Launched(step_id, rows, tokens, self._link.mark())

    def _forward(self, buffers: StepBuffers, view: GpuView, bucket: int) -> None:
        self._kernels.prepare(self._packet, self.state, buffers)
        logits = self.backend.forward(view)
        if bucket not in self._logits:
            self._logits[bucket] = torch.empty_like(logits)
        self._logits[bucket].copy_(logits)

    def _sample(self, buffers: StepBuffers, bucket: int) -> None:
        sampled = self._kernels.sample(self._logits[bucket], self.state, buffers)
        self._kernels.finish(sampled, self.state, buffers)

    def _step_by_logits(self, step_id: int, rows: list[LaunchedRow]) -> Launched:
        """Wait until all tokens are known, then forward, score and sample as the reference does."""
        for step in self._pending:
            step.result()
        buffers, view = self._bucket(bucket_of(sum(row.count for row in rows)))
        self._kernels.prepare(self._packet, self.state, buffers)
        wanted = torch.tensor(wanted_rows(rows), dtype=torch.int32, device=self.device)
        logits = self.backend.forward(view.asking(wanted)).float()
        results = [ResultRow(row.number, row.start + row.count, [], [], []) for row in rows]
        jobs = [job for row, result in zip(rows, results, strict=True) for job in jobs_of(row, result)]
        if jobs:
            run_jobs(logits, jobs)
        sampled = [result.token_ids[0] if result.token_ids else -1 for result in results]
        sampled += [-1] * (len(buffers.result) - len(sampled))
        self._kernels.finish(torch.tensor(sampled, dtype=torch.int32, device=self.device), self.state, buffers)
        return Launched(step_id, rows, buffers.result, lambda: None, StepResult(step_id, results))

    def _bucket(self, tokens: int) -> tuple[StepBuffers, GpuView]:
        if tokens not in self._buckets:
            buffers = step_buffers(tokens, min(tokens, self._max_rows), self.device)
            shape = self._arena.shape
            view = GpuView(
                tokens=buffers.tokens,
                positions=buffers.positions,
                slots=buffers.slots,
                rows=buffers.rows,
                block_tables=self.state.block_tables,
                kv=self._arena.kv,
                places=shape.layout.places,
                page_size=shape.page_size,
                num_kv_heads=shape.kv_heads,
                head_dim=shape.head_dim,
            )
            self._buckets[tokens] = (buffers, view)
        return self._buckets[tokens]

    def _write_prompt(self, new: NewSequence) -> None:
        ids = torch.tensor(new.token_ids, dtype=torch.int32)
        self.state.pool[new.slot, : len(ids)].copy_(ids)

    def _upload(self, packet: torch.Tensor, changes: Changes, rows: Sequence[LaunchedRow]) -> None:
        """Fill the packet and send it; pairs that find no place in it are sent before."""
        words = packet.numpy()
        pairs = self._pairs(changes)
        while len(pairs) > PAIRS:
            self._send(torch.from_numpy(_with_pairs(np.zeros_like(words), pairs[:PAIRS], self._max_rows)))
            pairs = pairs[PAIRS:]
        words[:HEADER] = (len(rows), len(pairs), 0, 0)
        table = words[HEADER : HEADER + ROW * len(rows)].reshape(-1, ROW)
        for at, row in enumerate(rows):
            table[at] = (row.number, row.count, row.offset, row.start + row.count)
        self._send(torch.from_numpy(_with_pairs(words, pairs, self._max_rows)) if pairs else packet)

    def _send(self, packet: torch.Tensor) -> None:
        self._packet.copy_(packet, non_blocking=True)
        if packet[1]:
            self._kernels.scatter(self._packet, self.state, self._max_rows)

    def _pairs(self, changes: Changes) -> list[tuple[int, int]]:
        state = self.state
        pairs = [(state.table_word(g, slot, entry), page) for g, slot, entry, page in changes.words()]
        for new in changes.new:
            values = {"num_computed": new.num_computed, "num_tokens": len(new.token_ids), **_fields(new.sampling)}
            pairs += [(state.field_word(name, new.slot), value) for name, value in values.items()]
        return pairs


def _with_pairs(words: np.ndarray, pairs: list[tuple[int, int]], max_rows: int) -> np.ndarray:
    start = HEADER + ROW * max_rows
    words[1] = len(pairs)
    words[start : start + 2 * len(pairs)] = np.array(pairs, dtype=np.int32).reshape(-1)
    words[start + 2 * len(pairs) :: 2] = -1
    return words


def _fields(sampling: SamplingRow) -> dict[str, int]:
    floats = np.array([sampling.temperature, sampling.top_p, sampling.min_p], dtype=np.float32).view(np.int32)
    seed = np.array([sampling.seed & _WORD, sampling.seed >> 32 & _WORD], dtype=np.uint32).view(np.int32)
    temperature, top_p, min_p = floats.tolist()
    low, high = seed.tolist()
    return {
        "temperature": temperature,
        "top_k": max(0, sampling.top_k),
        "top_p": top_p,
        "min_p": min_p,
        "seed_low": low,
        "seed_high": high,
        "sample_index": sampling.sample_index,
    }


def _needs_logits(row: LaunchedRow) -> bool:
    """Whether a row asks for what the captured sampler does not do."""
    sampling = row.slot.sampling
    edited = sampling.logit_bias or sampling.allowed_ids is not None or sampling.banned_ids or sampling.bad_words
    told = sampling.logprobs >= 0 or sampling.prompt_logprobs >= 0
    waits = bool(sampling.stop_ids) and row.slot.num_tokens - row.slot.num_prompt <= sampling.min_tokens
    return bool(edited or told or sampling.masked or has_penalties(sampling) or (waits and sampling.min_tokens))
