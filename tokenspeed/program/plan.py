"""The plan pass: for one token-count bucket, an implementation for every record and a buffer for every value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.ops.definitions import OPS
from tokenspeed.program.program import Program, Record

BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
BEYOND = 256


def bucket_of(tokens: int) -> int:
    """The smallest bucket that holds `tokens`; beyond the last, the next multiple of BEYOND."""
    return next((bucket for bucket in BUCKETS if bucket >= tokens), -(-tokens // BEYOND) * BEYOND)


@dataclass(frozen=True, eq=False)
class Planned:
    """A record, what runs it, and the values that are dead after it."""

    record: Record
    implementation: Implementation
    frees: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Plan:
    """Records in order with implementations. buffers[v] is the buffer of value v; buffer_elements their sizes.

    A view shares the buffer of what it views; an order token has none. Values of one buffer are never alive together.
    """

    bucket: int
    steps: tuple[Planned, ...]
    buffers: dict[int, int]
    buffer_elements: tuple[int, ...]


def plan(program: Program, registry: Registry, situation: Situation) -> Plan:
    """Choose implementations for a bucket of `situation.tokens`. Raises UnsupportedError where an op has none."""
    lowered: list[tuple[Record, Implementation]] = []
    for record in program.records:
        _lower(program, record, registry, situation, lowered)
    steps = _with_frees(program, lowered)
    buffers, elements = _assign_buffers(program, steps, situation.tokens)
    return Plan(situation.tokens, steps, buffers, elements)


def _lower(
    program: Program,
    record: Record,
    registry: Registry,
    situation: Situation,
    out: list[tuple[Record, Implementation]],
) -> None:
    chosen = registry.choose(record.op, program.operands(record), situation)
    if chosen is not None:
        out.append((record, chosen))
        return
    if not record.parts:
        promise = " that gives a row the same bits in every batch" if situation.batch_invariant else ""
        raise UnsupportedError(f"op {record.op} has no implementation on {situation.device}{promise}")
    for part in record.parts:
        _lower(program, part, registry, situation, out)


def _is_view(record: Record) -> bool:
    return not record.parts and OPS[record.op].view


def _roots(records: list[Record]) -> Callable[[int], int]:
    """Map a value to the value that owns its memory."""
    owner: dict[int, int] = {}
    for record in records:
        if _is_view(record):
            base = owner.get(record.inputs[0], record.inputs[0])
            owner.update(dict.fromkeys(record.outputs, base))
    return lambda value: owner.get(value, value)


def _with_frees(program: Program, lowered: list[tuple[Record, Implementation]]) -> tuple[Planned, ...]:
    last: dict[int, int] = {}
    for i, (record, _) in enumerate(lowered):
        last.update(dict.fromkeys(record.inputs + record.outputs, i))
    kept = set(program.outputs.values())
    dead: list[list[int]] = [[] for _ in lowered]
    for value, i in last.items():
        if value not in kept:
            dead[i].append(value)
    return tuple(Planned(r, impl, tuple(dead[i])) for i, (r, impl) in enumerate(lowered))


def _assign_buffers(
    program: Program, steps: tuple[Planned, ...], tokens: int
) -> tuple[dict[int, int], tuple[int, ...]]:
    """Linear scan: a value takes the free buffer whose size fits best, or a new one; it is free after its last
    reader."""
    root = _roots([step.record for step in steps])
    last = {root(v): i for i, step in enumerate(steps) for v in step.record.inputs + step.record.outputs}
    kept = {root(v) for v in program.outputs.values()}
    buffers: dict[int, int] = {}
    elements: list[int] = []
    free: list[int] = []
    for i, step in enumerate(steps):
        for value in step.record.outputs:
            if root(value) == value and program.shapes[value]:
                buffers[value] = _take(free, elements, _elements(program, value, tokens))
        ended = {root(v) for v in step.record.inputs + step.record.outputs}
        free.extend(buffers[v] for v in ended if last[v] == i and v not in kept and v in buffers)
        buffers.update({v: buffers[root(v)] for v in step.record.outputs if root(v) in buffers})
    return buffers, tuple(elements)


def _elements(program: Program, value: int, tokens: int) -> int:
    size = 1
    for dim in program.shapes[value]:
        size *= tokens if isinstance(dim, str) else dim
    return size


def _take(free: list[int], elements: list[int], size: int) -> int:
    fitting = [b for b in free if elements[b] >= size]
    best = min(fitting, key=lambda b: elements[b]) if fitting else max(free, key=lambda b: elements[b], default=None)
    if best is None:
        elements.append(size)
        return len(elements) - 1
    free.remove(best)
    elements[best] = max(elements[best], size)
    return best
