"""A model as data: a flat list of records over numbered values. Immutable; passes give new programs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tokenspeed.ops.definitions import OPS, Attrs, Cost, Operands, Shape, Workload


@dataclass(frozen=True, eq=False)
class Record:
    """One op applied to values. A fused record has `parts`, the records it stands for; it is defined as their
    composition.

    `inputs` and `outputs` are value numbers; of a fused record, those that cross its border.
    """

    op: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    weights: tuple[str, ...] = ()
    attrs: Attrs = field(default_factory=dict)
    parts: tuple[Record, ...] = ()

    def plain(self) -> Iterator[Record]:
        """The plain records this one stands for, in order."""
        if not self.parts:
            yield self
        for part in self.parts:
            yield from part.plain()


@dataclass(frozen=True, eq=False)
class Program:
    """Records in execution order. shapes[v] is the symbolic shape of value v.

    `inputs` names the values a step provides (tokens), `outputs` those it keeps (logits, captured states).
    """

    records: tuple[Record, ...]
    shapes: tuple[Shape, ...]
    weight_shapes: Mapping[str, tuple[int, ...]]
    inputs: Mapping[str, int]
    outputs: Mapping[str, int]

    def replace(self, records: tuple[Record, ...]) -> Program:
        """The same program with other records."""
        return Program(records, self.shapes, self.weight_shapes, self.inputs, self.outputs)

    @property
    def head(self) -> str:
        """The weight of the last projection, which makes the logits."""
        plain = [part for record in self.records for part in record.plain()]
        return next(part.weights[0] for part in reversed(plain) if part.op == "linear")

    def before_head(self) -> Program:
        """Its plain records from `select` to what enters the last projection, which is the only output: "hidden"."""
        plain = [part for record in self.records for part in record.plain()]
        first = next(i for i, part in enumerate(plain) if part.op == "select")
        last = max(i for i, part in enumerate(plain) if part.op == "linear")
        outputs = {"hidden": plain[last].inputs[0]}
        return Program(tuple(plain[first:last]), self.shapes, self.weight_shapes, self.inputs, outputs)

    def operands(self, record: Record) -> Operands:
        """Shapes of everything a plain record touches."""
        return Operands(
            tuple(self.shapes[v] for v in record.inputs),
            tuple(self.shapes[v] for v in record.outputs),
            record.weights,
            tuple(self.weight_shapes[name] for name in record.weights),
            record.attrs,
        )

    def cost(self, record: Record, work: Workload) -> Cost:
        """Cost of a record; of a fused one, the sum of its parts less the activations that stay inside it."""
        total = sum((OPS[part.op].cost(self.operands(part), work) for part in record.plain()), Cost())
        if not record.parts:
            return total
        border = sum(work.size(self.shapes[v]) for v in record.inputs + record.outputs)
        return Cost(total.weight_bytes, total.kv_bytes, border * work.act_bytes, total.flops)
