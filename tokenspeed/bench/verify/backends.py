"""A backend's records, one by one: what it plans for a step and how one of them runs on given rows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch

from tokenspeed.bench.verify.plain import Tensors
from tokenspeed.bench.verify.steps import Step
from tokenspeed.kernels.triton.view import Reach
from tokenspeed.program.plan import Planned, bucket_of
from tokenspeed.program.program import Program
from tokenspeed.runner.cpu_backend import CpuBackend
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.gpu.view import GpuView
from tokenspeed.runner.model import LoadedModel

POISON_BYTES = 64 << 20
REFERENCES = ("ref",)
"""Backends whose implementations are no fast kernels."""


class Records(Protocol):
    """dtype: of activations as the kernels round them. formats: of weights as they read them."""

    @property
    def model(self) -> LoadedModel: ...
    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def formats(self) -> Mapping[str, tuple[str, ...]]: ...

    @property
    def by(self) -> str: ...

    def body(self, step: Step) -> Sequence[Planned]:
        """What runs before the head; the records run on this step from now on."""
        ...

    def head(self, rows: int) -> Sequence[Planned]:
        """What runs behind the selection of so many rows."""
        ...

    def run(self, planned: Planned, inputs: Mapping[int, torch.Tensor]) -> Tensors:
        """Outputs of a record by value, without those that have no elements, over poisoned memory."""
        ...


def at_select(steps: Sequence[Planned]) -> int:
    """The place of the record that selects the rows of the head."""
    return next(i for i, step in enumerate(steps) if step.record.op == "select")


class CpuRecords:
    """The C++ walk's."""

    dtype = torch.float32

    def __init__(self, backend: CpuBackend, model: LoadedModel) -> None:
        self._backend, self.model, self.formats = backend, model, model.formats

    @property
    def by(self) -> str:
        return f"cpu {self._backend.isa}"

    def body(self, step: Step) -> Sequence[Planned]:
        self._backend.bind(step.arena)
        self._backend.body(step.fed)
        return self._backend.steps[: at_select(self._backend.steps)]

    def head(self, rows: int) -> Sequence[Planned]:
        return self._backend.steps[at_select(self._backend.steps) + 1 :]

    def run(self, planned: Planned, inputs: Mapping[int, torch.Tensor]) -> Tensors:
        record, program = planned.record, self.model.program
        if record.op == "split":
            return dict(zip(record.outputs, _split(planned, inputs), strict=True))
        if record.op == "softcap":
            cap = record.attrs["cap"]
            return {record.outputs[0]: cap * torch.tanh(inputs[record.inputs[0]] / cap)}
        given = {v: _rows_of(x) for v, x in inputs.items() if program.shapes[v] and x.dtype != torch.int64}
        count = next(iter(inputs.values())).shape[0]
        made = {
            v: np.full((count, int(program.shapes[v][-1])), np.nan, np.float32)
            for v in record.outputs
            if program.shapes[v]
        }
        self._backend.run_record(record, given, made)
        chosen = set(record.outputs[:1]) if record.op == "route" else set()
        return {v: torch.from_numpy(x.view(np.int32) if v in chosen else x) for v, x in made.items()}


def _rows_of(x: torch.Tensor) -> np.ndarray:
    array = x.contiguous().numpy()
    return array.view(np.float32) if x.dtype == torch.int32 else array.astype(np.float32, copy=False)


def _split(planned: Planned, inputs: Mapping[int, torch.Tensor]) -> tuple[torch.Tensor, ...]:
    (x,) = (inputs[v] for v in planned.record.inputs)
    return x.split(list(planned.record.attrs["sizes"]), dim=-1)


class GpuRecords:
    """Those of a GPU's plan, each called as the walk calls it; a step has the padding that it has in the engine."""

    def __init__(self, backend: GpuBackend) -> None:
        # Triton is an optional package.
        from tokenspeed.kernels.cuda.attend import reach_of
        from tokenspeed.runner.gpu.link import TritonSteps

        self._backend, self.model, self.dtype = backend, backend.model, backend.model.dtype
        self.formats = backend.formats
        self._kernels = TritonSteps(backend.num_heads, self.dtype.itemsize, backend.batch_invariant)
        self._reach_of: Callable[[Sequence[int]], Reach] = reach_of
        self._view: GpuView | None = None
        self._count = 0

    @property
    def by(self) -> str:
        return "gpu, batch-invariant" if self._backend.batch_invariant else "gpu"

    def body(self, step: Step) -> Sequence[Planned]:
        bucket = bucket_of(step.tokens)
        self._view, self._count = self._view_of(step, bucket), step.tokens
        planned = self._backend.plan_for(bucket).steps
        return planned[: at_select(planned)]

    def head(self, rows: int) -> Sequence[Planned]:
        planned = self._backend.plan_for(rows).steps
        self._count = 0
        return planned[at_select(planned) + 1 :]

    def run(self, planned: Planned, inputs: Mapping[int, torch.Tensor]) -> Tensors:
        record, implementation, program = planned.record, planned.implementation, self.model.program
        given = [self._padded(inputs[v]) for v in record.inputs]
        weights = [self._backend.weights[name] for name in record.weights]
        _poison(self.model.device)
        if implementation.backend in REFERENCES:
            outputs = implementation.run(self._view, given, weights, record.attrs)
        else:
            outputs = implementation.run(self._view, record, given, weights)
        named = zip(record.outputs, outputs, strict=True)
        return {v: y[: self._count] if self._count else y for v, y in named if program.shapes[v]}

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """Rows of padding repeat the first; an order token stays as it is."""
        if self._view is None or not self._count or x.shape[0] != self._count:
            return x
        missing = len(self._view.tokens) - self._count
        return torch.cat((x, x[:1].expand(missing, *x.shape[1:]))) if missing else x

    def _view_of(self, step: Step, bucket: int) -> GpuView:
        device, shape, fed = self.model.device, step.arena.shape, step.fed
        groups = len(shape.layout.windows)
        pages = max(len(row.slot.tables[0]) for row in fed)
        tables = torch.full((groups, len(fed), pages), -1, dtype=torch.int32)
        for row in fed:
            for group, table in enumerate(row.slot.tables):
                tables[group, row.number, : len(table)] = torch.tensor(table)
        own = step.view()
        ints = partial(torch.tensor, dtype=torch.int32, device=device)
        slots = [row.number for row in fed for _ in range(row.count)] + [-1] * (bucket - step.tokens)
        starts = np.cumsum([0, *(row.count for row in fed)]).tolist()
        mixed = any(row.count > 1 for row in fed)
        inputs = SimpleNamespace(
            tokens=ints([0] * bucket),
            row_slots=ints([row.number for row in fed]),
            row_starts=ints(starts[:-1]),
            row_counts=ints([row.count for row in fed]),
            row_firsts=ints([row.start for row in fed]),
        )
        inputs.tokens[: step.tokens] = own.tokens
        decodes = mixed and any(row.count == 1 for row in fed)
        items, decode_rows = self._kernels.items(inputs, ints([len(fed)]), step.arena, mixed, decodes)
        positions = ints([0] * bucket)
        positions[: step.tokens] = own.positions
        return GpuView(
            tokens=inputs.tokens,
            positions=positions,
            slots=ints(slots),
            rows=ints([end - 1 for end in starts[1:]]),
            block_tables=tables.to(device),
            kv=step.arena.kv,
            places=shape.layout.places,
            page_size=shape.page_size,
            num_kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            items=items,
            decode_rows=decode_rows,
            one_each=not mixed,
            reach=Reach.UNEVEN if mixed else self._reach_of([row.start for row in fed]),
        )


def _poison(device: torch.device) -> None:
    """Leave no numbers in the memory that the next outputs will take."""
    size = POISON_BYTES if device.type == "cuda" else 1 << 16
    poison = torch.full((size // 4,), torch.nan, device=device)
    del poison


def signature(planned: Planned, program: Program, formats: Mapping[str, tuple[str, ...]]) -> tuple[object, ...]:
    """Equal for records that differ in nothing but their layer's values."""
    parts = tuple(
        (part.op, tuple(sorted((k, repr(v)) for k, v in part.attrs.items() if k not in ("layer", "kv_scale"))))
        for part in planned.record.plain()
    )
    record = planned.record
    weights = tuple((program.weight_shapes[name], formats.get(name)) for name in record.weights)
    shapes = tuple(program.shapes[v] for v in record.inputs + record.outputs)
    return planned.implementation.name, record.op, parts, weights, shapes
