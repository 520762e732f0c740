"""The fuse pass: a peephole table that groups runs of ops into the shapes fast kernels exist for.

A group is a record whose `parts` are what it replaces, possibly groups themselves, so a backend without a kernel for
the whole can fall back to a smaller group or to plain ops. Anything unexpected between two ops of a pattern (an
adapter's
delta, a captured state, a second reader) leaves a value with another reader, and the pattern does not match.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from tokenspeed.program.program import Program, Record


class Window:
    """The records so far, searchable by the value they give; grouping keeps their order valid."""

    def __init__(self, program: Program) -> None:
        self.records: list[Record] = []
        self._producer: dict[int, Record] = {}
        self._readers: Counter[int] = Counter(v for record in program.records for v in record.inputs)
        self._readers.update(program.outputs.values())

    def push(self, record: Record) -> None:
        """Append a record."""
        self.records.append(record)
        for value in record.outputs:
            self._producer[value] = record

    def producer(self, value: int, *ops: str) -> Record | None:
        """The record that gives a value, if its op is one of `ops`."""
        record = self._producer.get(value)
        return record if record is not None and record.op in ops else None

    def only(self, value: int, *ops: str) -> Record | None:
        """The same, if besides nobody else reads the value."""
        return self.producer(value, *ops) if self._readers[value] == 1 else None

    def group(self, op: str, *parts: Record) -> Record | None:
        """One record for `parts` at the place of the last, or None where another record between reads one of their
        values."""
        inside = {v for part in parts for v in part.outputs}
        uses = Counter(v for part in parts for v in part.inputs)
        outputs = tuple(v for part in parts for v in part.outputs if self._readers[v] > uses[v])
        inputs = tuple(dict.fromkeys(v for part in parts for v in part.inputs if v not in inside))
        chosen = set(map(id, parts))
        first = next((i for i, record in enumerate(self.records) if id(record) in chosen), len(self.records))
        between = [record for record in self.records[first:] if id(record) not in chosen]
        if any(v in inside for record in between for v in record.inputs):
            return None
        self.records = self.records[:first] + between
        self._readers.subtract(uses)
        self._readers.update(inputs)
        weights = tuple(name for part in parts for name in part.weights)
        return Record(op, inputs, outputs, weights, {}, parts)


Pattern = Callable[[Window, Record], Record | None]


def join_norm(window: Window, record: Record) -> Record | None:
    """[branch norm +] residual add + norm. The sum stays visible: it is the residual stream."""
    if record.op != "norm" or record.attrs["per_head"]:
        return None
    add = window.producer(record.inputs[0], "add")
    if add is None:
        return None
    branches = [window.only(v, "norm") for v in add.inputs]
    found = [b for b in branches if b is not None and not b.attrs["per_head"]]
    if len(found) == 1:
        return window.group("branch_join_norm", found[0], add, record)
    return window.group("join_norm", add, record)


def norm_linear(window: Window, record: Record) -> Record | None:
    """Norm, or join and norm, in front of a projection that is its only reader."""
    if record.op != "linear":
        return None
    norm = window.only(record.inputs[0], "norm", "join_norm", "branch_join_norm")
    if norm is None or (norm.op == "norm" and norm.attrs["per_head"]):
        return None
    return window.group(f"{norm.op}_linear", norm, record)


def linear_act(window: Window, record: Record) -> Record | None:
    """A gate/up projection, with whatever was joined to it, and its activation."""
    if record.op != "act_mul":
        return None
    joined = ("linear", "norm_linear", "join_norm_linear", "branch_join_norm_linear")
    linear = window.only(record.inputs[0], *joined)
    return window.group(f"{linear.op}_act", linear, record) if linear is not None else None


def norm_route(window: Window, record: Record) -> Record | None:
    """Norm, or join and norm, the router behind it, and the choice, with its attributes. The normed row stays visible:
    experts take it."""
    if record.op != "route":
        return None
    linear = window.only(record.inputs[0], "linear")
    norm = linear and window.producer(linear.inputs[0], "norm", "join_norm", "branch_join_norm")
    if linear is None or norm is None or (norm.op == "norm" and norm.attrs["per_head"]):
        return None
    group = window.group(f"{norm.op}_route", norm, linear, record)
    return group and replace(group, attrs=record.attrs)


def rope_write(window: Window, record: Record) -> Record | None:
    """[per-head norms of q and k +] rope + KV page write."""
    if record.op != "kv_write":
        return None
    rope = window.only(record.inputs[0], "rope")
    if rope is None:
        return None
    norms = [window.only(v, "norm") for v in rope.inputs]
    found = [n for n in norms if n is not None and n.attrs["per_head"]]
    if len(found) == len(rope.inputs):
        return window.group("qk_norm_rope_write", *found, rope, record)
    return window.group("rope_write", rope, record)


def rope_attention(window: Window, record: Record) -> Record | None:
    """[per-head norms +] rope + KV page write, and the attention that alone reads them; with its attributes."""
    if record.op != "attention":
        return None
    writes = [window.only(v, "rope_write", "qk_norm_rope_write") for v in record.inputs]
    if writes[0] is None or any(write is not writes[0] for write in writes):
        return None
    group = window.group(writes[0].op.replace("write", "attention"), writes[0], record)
    return group and replace(group, attrs=record.attrs)


PATTERNS: tuple[Pattern, ...] = (join_norm, norm_linear, linear_act, norm_route, rope_write, rope_attention)


def fuse(program: Program) -> Program:
    """Group what the table knows; every other record stays as it is. The result computes the same function."""
    window = Window(program)
    for record in program.records:
        current = record
        for pattern in PATTERNS:
            current = pattern(window, current) or current
        window.push(current)
    return program.replace(tuple(window.records))
