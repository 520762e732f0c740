"""The planned program as a table: one row per record, adding up to what `sol` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tokenspeed.kernels import ref
from tokenspeed.kernels.registry import Registry, Situation
from tokenspeed.observability.ceilings import Ceilings
from tokenspeed.ops.definitions import Shape
from tokenspeed.program.fuse import fuse
from tokenspeed.program.plan import Plan, bucket_of, plan
from tokenspeed.program.program import Program, Record
from tokenspeed.sol.floor import Floor, ceilings_for, decode_work, kv_element_bytes, record_floor, stored_bytes, total
from tokenspeed.sol.report import find_definition


@dataclass(frozen=True)
class PlanRow:
    """One record of the plan. `group` names the fused shape it belongs to, or is its own op."""

    op: str
    group: str
    weights: tuple[str, ...]
    shapes: str
    implementation: str
    floor: Floor


@dataclass(frozen=True)
class PlanTable:
    """All rows, for one bucket."""

    model: str
    ceilings: Ceilings
    bucket: int
    buffers: int
    buffer_elements: int
    rows: list[PlanRow]

    @property
    def total(self) -> Floor:
        """Sum of the rows."""
        return total([row.floor for row in self.rows])

    def as_json(self) -> dict[str, Any]:
        """As JSON values; floor in microseconds."""
        return {
            "model": self.model,
            "machine": self.ceilings.machine,
            "bucket": self.bucket,
            "rows": [_row_json(row) for row in self.rows],
            "floor_ms": self.total.seconds * 1e3,
            "bytes": round(self.total.cost.bytes),
            "flops": round(self.total.cost.flops),
        }

    def text(self) -> str:
        """As a table."""
        head = (
            f"{self.model} on {self.ceilings.machine}, bucket of {self.bucket} tokens, "
            f"{self.buffers} activation buffers of {self.buffer_elements} elements"
        )
        lines = [
            head,
            "",
            f"{'op':<11}{'fused as':<32}{'by':<6}{'shapes':<44}{'MB':>10}{'MFLOP':>10}{'floor us':>10}  weights",
        ]
        for row in self.rows:
            cost = row.floor.cost
            lines.append(
                f"{row.op:<11}{row.group:<32}{row.implementation:<6}{row.shapes:<44}{cost.bytes / 1e6:>10.3f}"
                f"{cost.flops / 1e6:>10.2f}{row.floor.seconds * 1e6:>10.2f}  {' '.join(row.weights)}"
            )
        whole = self.total
        lines.append(
            f"{'total':<93}{whole.cost.bytes / 1e6:>10.3f}{whole.cost.flops / 1e6:>10.2f}{whole.seconds * 1e6:>10.2f}"
        )
        return "\n".join(lines)


def _row_json(row: PlanRow) -> dict[str, Any]:
    cost = row.floor.cost
    return {
        "op": row.op,
        "group": row.group,
        "implementation": row.implementation,
        "shapes": row.shapes,
        "weights": list(row.weights),
        "weight_bytes": round(cost.weight_bytes),
        "kv_bytes": round(cost.kv_bytes),
        "act_bytes": round(cost.act_bytes),
        "flops": round(cost.flops),
        "floor_us": row.floor.seconds * 1e6,
    }


def plan_table(
    model: str | None, gpu: str | None, batch: int, context: int, quantization: str, kv_cache_dtype: str = "bfloat16"
) -> PlanTable:
    """The plan of a decode step of `batch` sequences. Raises as `sol` does."""
    ceilings = ceilings_for(gpu)
    name, definition, checkpoint = find_definition(model)
    kv_bytes = kv_element_bytes(kv_cache_dtype, definition.config.head_dim)
    stored = stored_bytes(definition.weights, checkpoint, quantization, gpu is not None)
    work = decode_work(batch, context, stored, kv_bytes=kv_bytes)
    program, fp8 = fuse(definition.program()), quantization == "fp8" or definition.multiplies_fp8
    registry = Registry()
    ref.register(registry)
    made = plan(program, registry, Situation("cuda" if gpu else "cpu", "bfloat16", bucket_of(batch), {}))
    groups = {id(part): record.op for record in program.records for part in record.plain()}
    rows = [
        PlanRow(
            step.record.op,
            groups.get(id(step.record), step.record.op),
            step.record.weights,
            _shapes(program, step.record),
            step.implementation.name,
            record_floor(program, step.record, work, ceilings, fp8),
        )
        for step in made.steps
    ]
    return PlanTable(name, ceilings, made.bucket, len(made.buffer_elements), _elements(made), rows)


def _elements(made: Plan) -> int:
    return sum(made.buffer_elements)


def _shapes(program: Program, record: Record) -> str:
    ins = " ".join(_shape(program.shapes[v]) for v in record.inputs)
    outs = " ".join(_shape(program.shapes[v]) for v in record.outputs)
    return f"{ins} -> {outs}"


def _shape(shape: Shape) -> str:
    return "[" + ",".join(map(str, shape)) + "]"
