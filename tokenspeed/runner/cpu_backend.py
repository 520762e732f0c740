"""The `cpu` backend: the planned program is handed to C++ once, and every step is two calls into it.

Activations are float32 and multiply packed weights as integers of 16 bits per block; KV is bfloat16, float32,
int8 or fp8.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.kernels.cpu.registration import FORMATS, forced_isa, register
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.ops.definitions import UNSCALED
from tokenspeed.ops.kv import kv_dtype_name
from tokenspeed.ops.reference import frequencies
from tokenspeed.ops.rope import Rope
from tokenspeed.program.plan import Plan, Planned, plan
from tokenspeed.program.program import Record
from tokenspeed.runner.arena import Arena
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.inputs import FedRow
from tokenspeed.runner.model import LoadedModel, Progress
from tokenspeed.runner.packed_copy import PackedCopy
from tokenspeed.runner.packing import pack_weights
from tokenspeed.runner.sampler import log_min_p, settle

if TYPE_CHECKING:
    from tokenspeed.kernels.cpu import _walk

Array = npt.NDArray[np.float32]
BLOCK = 32
"""Columns of a block of packed weights."""
_LOOK_BYTES, _CLOSE_BYTES = 304 / 16, 128
"""Of a block of a screened head's row: what the first look reads, and the cache lines that an exact product adds."""
_SEED, _COUNTER = 2**64 - 1, 2**32 - 1
KV_FORMATS = (torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn)
"""Types of KV pages, in the order of the C++ enum."""
_IN_OTHERS = ("split", "softcap")
"""Ops without a kernel: columns of others' values, and a cap that keeps the order of logits."""
HEAD_UNIT = 16
"""Head sizes are whole vectors."""


def why_not(model: LoadedModel, kv_dtype: torch.dtype) -> list[str]:
    """Ops and formats of a model that the C++ walk has no kernel for; empty when it takes all."""
    missing = [f"kv_cache_dtype {kv_dtype_name(kv_dtype)}"] if kv_dtype not in KV_FORMATS else []
    shape = model.definition.config
    if shape.head_dim % HEAD_UNIT:
        missing.append(f"head_dim {shape.head_dim}")
    registry, situation = Registry(), Situation("cpu", "float32", 1, model.formats)
    register(registry)
    for record in model.program.records:
        missing += _unplanned(model, record, registry, situation)
    missing += sorted(
        {f"weights in {fmt}" for name in model.stored for fmt in model.formats[name] if fmt not in FORMATS}
    )
    return list(dict.fromkeys(missing))


def _unplanned(model: LoadedModel, record: Record, registry: Registry, situation: Situation) -> list[str]:
    if registry.choose(record.op, model.program.operands(record), situation) is not None:
        return []
    if not record.parts:
        return [record.op]
    return [op for part in record.parts for op in _unplanned(model, part, registry, situation)]


class CpuBackend:
    """Packed weights and the program, in C++."""

    name = "cpu"
    fallback_ops: Sequence[str] = ()
    max_passes = 8

    def __init__(
        self,
        model: LoadedModel,
        threads: int | None = None,
        lm_head: str = "screened",
        progress: Progress | None = None,
        copy: PackedCopy | None = None,
    ) -> None:
        """threads: by default those this process may use. lm_head: screened or full. copy: where packed weights
        are kept on disk.

        Raises ConfigError for an unknown instruction set, and for a copy that cannot be written.
        """
        from tokenspeed.kernels.cpu import _walk

        # Torch's own threads spin after each op and would take the cores from ours; sampling is all that is left to it.
        torch.set_num_threads(1)
        self._model = model
        self._walk = _walk
        try:
            self._native = _walk.Model(threads or len(os.sched_getaffinity(0)), forced_isa())
        except ValueError as error:
            raise ConfigError(str(error)) from None
        self._ropes: dict[Rope, int] = {}
        self._cap = next((record.attrs["cap"] for record in model.program.records if record.op == "softcap"), 0.0)
        self._screened = _screened_head(model) if lm_head == "screened" else None
        planes = {self._screened} if self._screened else set()
        handles = pack_weights(self._native, model.packed, planes, copy, _walk.LAYOUT_VERSION, progress)
        self._matrices, self._vectors, self._experts = handles.matrices, handles.vectors, handles.experts
        self._picks = self._rows_of_logits = 0
        self._plan = self._make_plan()
        self._values = self._add_values()
        self._timed = [step for step in self._plan.steps if step.record.op not in _IN_OTHERS]
        self._ops = {id(step.record): self._op(step.record) for step in self._timed}
        for op in self._ops.values():
            self._native.add_op(op)
        self._arena: Arena | None = None
        self._step: tuple[Any, ...] = ()

    @property
    def weight_bytes(self) -> dict[str, float]:
        """Bytes of each weight that a row reads; for a screened head the mean over all rows so far."""
        bytes_ = {name: float(weight.nbytes) for name, weight in self._model.packed.items()}
        native = self._native
        whole = native.whole + self._rows_of_logits
        if self._screened and native.looked:
            rows, cols = self._model.packed[self._screened].shape
            looks = cols / BLOCK * (native.looked * rows * _LOOK_BYTES + native.rescored * _CLOSE_BYTES)
            drawn = self._picks + self._rows_of_logits
            bytes_[self._screened] = (looks + whole * bytes_[self._screened]) / drawn
        return bytes_

    @property
    def isa(self) -> str:
        """The instruction set whose kernels run."""
        return self._native.isa

    def time_records(self) -> Callable[[], list[tuple[Planned, float]]]:
        """Take the times of every record from now on; what is given back tells the seconds of each so far."""
        self._native.time_ops()
        return lambda: list(zip(self._timed, self._native.seconds, strict=True))

    @property
    def steps(self) -> tuple[Planned, ...]:
        """The plan, which holds for any number of tokens."""
        return self._plan.steps

    def run_record(self, record: Record, inputs: Mapping[int, Array], outputs: Mapping[int, Array]) -> None:
        """Run one record of the plan alone: for checks. Rows by value number, float32 [rows, columns], ids of experts
        as their bits. What `outputs` hold at first is where the record writes, before it does. What a step sees is
        that of the last `body`, whose arrays this object keeps."""
        given = [(self._values[value], rows) for value, rows in (*inputs.items(), *outputs.items())]
        self._native.run_alone(self._ops[id(record)], given, [(self._values[v], rows) for v, rows in outputs.items()])

    def bind(self, arena: Arena) -> None:
        """Use an arena's pages."""
        kv, layout = arena.kv, arena.shape.layout
        size = kv.element_size()
        strides = [kv.stride(axis) * size for axis in range(5)]
        groups, places = ([place[i] for place in layout.places] for i in range(2))
        self._native.set_cache(
            kv.data_ptr(),
            strides,
            arena.shape.page_size,
            KV_FORMATS.index(kv.dtype),
            groups,
            places,
        )
        self._arena = arena

    def body(self, fed: Sequence[FedRow]) -> None:
        self._step = _step(fed)
        self._native.body(*self._step)

    def decode(self, fed: Sequence[FedRow], asks: Sequence[SampledRow], most: int) -> list[list[int]]:
        if self._needs_cap(asks):
            return []
        ends = {token for ask in asks for token in ask.sampling.stop_ids}
        passes = self._native.decode(most, list(ends), [native_ask(ask) for ask in asks], *_step(fed))
        self._picks += len(asks) * len(passes)
        drawn = []
        for number, found in enumerate(passes):
            if not all(found):
                break  # logits that are not numbers, or too close to where top_p cuts: let the sampler draw
            drawn.append([_settled(candidates, ask, number) for candidates, ask in zip(found, asks, strict=True)])
        return drawn

    def pick(self, rows: Sequence[int], asks: Sequence[SampledRow]) -> list[int] | None:
        if self._needs_cap(asks):
            return None
        self._picks += len(rows)
        found = self._native.pick(np.array(rows, np.int32), [native_ask(ask) for ask in asks])
        if not all(found):
            return None  # logits that are not numbers, or too close to where top_p cuts: let the sampler draw
        return [_settled(candidates, ask, 0) for candidates, ask in zip(found, asks, strict=True)]

    def logits(self, rows: Sequence[int]) -> torch.Tensor:
        self._rows_of_logits += len(rows)
        out = torch.empty(len(rows), self._model.program.weight_shapes[self._model.program.head][0])
        self._native.head(np.array(rows, dtype=np.int32), out.numpy())
        return self._cap * torch.tanh(out / self._cap) if self._cap else out

    def hidden(self, rows: Sequence[int]) -> torch.Tensor:
        shape = self._model.definition.config
        out = torch.empty(len(rows), shape.hidden_size)
        self._native.hidden(np.array(rows, dtype=np.int32), out.numpy())
        return out * shape.logits_divisor

    def _needs_cap(self, asks: Sequence[SampledRow]) -> bool:
        """Whether a soft cap of the logits, which the native head leaves out, matters: it keeps their order."""
        return self._cap > 0 and any(ask.sampling.temperature > 0 for ask in asks)

    def _make_plan(self) -> Plan:
        registry = Registry()
        register(registry)
        return plan(self._model.program, registry, Situation("cpu", "float32", 1, self._model.formats))

    def _add_values(self) -> dict[int, int]:
        """Every value of the plan as a place in a buffer; views of columns share their base's."""
        places: dict[int, tuple[int, int, int]] = {}
        handles: dict[int, int] = {}
        shapes = self._model.program.shapes
        for step in self._plan.steps:
            record, offset = step.record, 0
            for value in record.outputs:
                if not shapes[value]:
                    continue
                width = int(shapes[value][-1])
                if record.op == "split":
                    buffer, start, stride = places[record.inputs[0]]
                    places[value] = (buffer, start + offset, stride)
                    offset += width
                else:
                    places[value] = (self._plan.buffers[value], 0, width)
                buffer, start, stride = places[value]
                handles[value] = self._native.add_value(buffer, start, width, stride)
        return handles

    def _op(self, record: Record) -> Any:
        kinds = self._walk.Kind
        if record.op.endswith(("linear", "linear_act")):
            op = self._linear(record)
        elif record.op.endswith("rope_write"):
            op = self._rope_write(record)
        elif record.op == "attention":
            op = self._attention(record)
        elif record.op == "route":
            op = self._route(record)
        elif record.op == "experts":
            op = self._chosen_experts(record)
        else:
            op = self._walk.Op({"act_mul": kinds.ActMul}.get(record.op) or getattr(kinds, record.op.capitalize()))
            op.x, op.out = self._values.get(record.inputs[0], -1), self._values[record.outputs[0]]
            if record.op == "add":
                op.branch = self._values[record.inputs[1]]
            elif record.op == "embed":
                op.matrix, op.scale = self._matrices[record.weights[0]], record.attrs["scale"]
            elif record.op == "norm":
                op.norm, op.eps, op.per_head = (
                    self._vectors[record.weights[0]],
                    record.attrs["eps"],
                    record.attrs["per_head"],
                )
            elif record.op == "act_mul":
                op.act = _act(record)
        return op

    def _linear(self, record: Record) -> Any:
        """Any projection: what is fused before and after it are optional fields."""
        op = self._walk.Op(self._walk.Kind.Linear)
        parts = {part.op: part for part in record.plain()}
        norms = [part for part in record.plain() if part.op == "norm"]
        linear = parts["linear"]
        op.matrix = self._matrices[linear.weights[0]]
        if len(linear.weights) > 1:
            op.bias = self._vectors[linear.weights[1]]
        if norms:
            op.norm, op.eps = self._vectors[norms[-1].weights[0]], norms[-1].attrs["eps"]
        if "add" in parts:
            self._join(op, parts["add"], norms)
        else:
            op.x = self._values[(norms[-1] if norms else linear).inputs[0]]
        if "act_mul" in parts:
            op.act = _act(parts["act_mul"])
        op.out = self._values[(parts.get("act_mul") or linear).outputs[0]]
        return op

    def _join(self, op: Any, add: Record, norms: list[Record]) -> None:
        op.sum = self._values[add.outputs[0]]
        x, branch = add.inputs
        if len(norms) == 2:
            normed = norms[0]
            x, branch = (x, normed.inputs[0]) if branch == normed.outputs[0] else (branch, normed.inputs[0])
            op.branch_norm, op.branch_eps = self._vectors[normed.weights[0]], normed.attrs["eps"]
        op.x, op.branch = self._values[x], self._values[branch]

    def _rope_write(self, record: Record) -> Any:
        op = self._walk.Op(self._walk.Kind.RopeWrite)
        parts = list(record.plain())
        rope, write = parts[-2], parts[-1]
        q, k = rope.inputs
        for part in parts[:-2]:
            if part.outputs[0] == q:
                q, op.norm, op.eps = part.inputs[0], self._vectors[part.weights[0]], part.attrs["eps"]
            else:
                k, op.branch_norm = part.inputs[0], self._vectors[part.weights[0]]
        op.x, op.branch, op.v = self._values[q], self._values[k], self._values[write.inputs[1]]
        op.out, op.rope, op.layer = self._values[rope.outputs[0]], self._rope(rope.attrs["rope"]), write.attrs["layer"]
        op.head_dim, op.kv_heads = write.attrs["head_dim"], write.attrs["kv_heads"]
        op.heads = int(self._model.program.shapes[rope.outputs[0]][-1]) // op.head_dim
        stored = write.attrs.get("kv_scale", UNSCALED)
        op.key_inverse, op.value_inverse = stored.key_inverse, stored.value_inverse
        return op

    def _attention(self, record: Record) -> Any:
        op = self._walk.Op(self._walk.Kind.Attention)
        op.x, op.out = self._values[record.inputs[0]], self._values[record.outputs[0]]
        for name in ("layer", "heads", "kv_heads", "head_dim", "window", "scale", "softcap"):
            setattr(op, name, record.attrs[name])
        stored = record.attrs.get("kv_scale", UNSCALED)
        op.scale, op.value_scale = record.attrs["scale"] * stored.key, stored.value
        if record.weights:
            op.sinks = self._vectors[record.weights[0]]
        return op

    def _route(self, record: Record) -> Any:
        op = self._walk.Op(self._walk.Kind.Route)
        op.x, (op.ids, op.shares) = self._values[record.inputs[0]], (self._values[v] for v in record.outputs)
        if record.weights:
            op.norm = self._vectors[record.weights[0]]
        op.score = ("softmax", "sigmoid", "logits").index(record.attrs["score"])
        for name in ("k", "renormalize", "groups", "kept_groups", "scale"):
            setattr(op, name, record.attrs[name])
        return op

    def _chosen_experts(self, record: Record) -> Any:
        op = self._walk.Op(self._walk.Kind.Experts)
        op.x, op.ids, op.shares = (self._values[v] for v in record.inputs)
        op.out, op.k = self._values[record.outputs[0]], int(self._model.program.shapes[record.inputs[1]][-1])
        gate_up, down, *biases = record.weights
        op.experts = self._native.add_experts(self._experts[gate_up], self._experts[down])
        if biases:
            op.bias, op.down_bias = (self._vectors[name] for name in biases)
        op.act, op.alpha, op.limit = _act(record), record.attrs["alpha"], record.attrs["limit"]
        return op

    def _rope(self, rope: Rope) -> int:
        if rope not in self._ropes:
            turns = frequencies(rope, torch.device("cpu"))
            self._ropes[rope] = self._native.add_rope(turns.numpy(), rope.scale)
        return self._ropes[rope]


def _screened_head(model: LoadedModel) -> str | None:
    """The name of the head's weight where it can be kept in planes, which are for drawing tokens."""
    name = model.program.head
    formats = [segment.fmt for segment in model.packed[name].segments]
    return name if formats == ["Q8_0"] and not model.definition.config.num_labels else None


def _act(record: Record) -> int:
    return ("silu", "gelu_tanh", "swiglu_clamped").index(record.attrs["act"])


def _step(fed: Sequence[FedRow]) -> tuple[Any, ...]:
    """Tokens, positions, row starts, block tables one after the other, their starts, and how many a row has."""
    tokens = [token for row in fed for token in row.slot.tokens[row.start : row.start + row.count]]
    positions = [p for row in fed for p in range(row.start, row.start + row.count)]
    tables = [table for row in fed for table in row.slot.tables]
    return (
        np.array(tokens, np.int32),
        np.array(positions, np.int32),
        np.array(list(accumulate((row.count for row in fed), initial=0)), np.int32),
        np.array(list(chain.from_iterable(tables)), np.int32),
        np.array(list(accumulate(map(len, tables[:-1]), initial=0)), np.int64),
        len(fed[0].slot.tables),
    )


def native_ask(row: SampledRow) -> _walk.Ask:
    """How C++ is to draw a row's token."""
    from tokenspeed.kernels.cpu import _walk

    of = row.sampling
    place = of.sample_index & _COUNTER, row.position & _COUNTER
    return _walk.Ask(of.temperature, of.seed & _SEED, *place, of.top_k, of.top_p, log_min_p(of))


def _settled(candidates: list[tuple[int, float]], ask: SampledRow, later: int) -> int:
    """The token of a row that was drawn `later` passes after what it asked for."""
    if len(candidates) == 1:
        return candidates[0][0]
    return settle(candidates, replace(ask, position=ask.position + later))
