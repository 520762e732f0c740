"""How far a whole model drifts from plain arithmetic: the residual stream after each layer, and logits.

Three ways walk the same tokens: float64; plain ops in a 16-bit type, as a framework without fast kernels computes; and
the backend's own records. The second is the yardstick for the third.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from tokenspeed.bench.verify.backends import Records
from tokenspeed.bench.verify.plain import PlainOps, Tensors
from tokenspeed.bench.verify.steps import Step
from tokenspeed.bench.verify.table import Figure, Row
from tokenspeed.ops.kv import KV_TORCH
from tokenspeed.program.program import Program, Record
from tokenspeed.runner.arena import PageShape

TIMES = {"cpu": 1.0, "gpu": 2.0, "ref": 2.0}
"""A backend may drift so many times as far as plain ops: a GPU's has their roundings in other places, the CPU's keeps
activations in float32."""
ROUTED = 2.0
"""So many times that where a router chooses: one tie decided otherwise changes all that comes after."""
LEAST = 1e-4
"""What counts as drift at all, as a part of the values."""
NARROW_KV = (torch.int8, KV_TORCH["fp8"])


@dataclass(frozen=True)
class Walked:
    """float64, of all tokens by rows: the residual stream behind each layer [tokens, columns], and logits [tokens,
    vocabulary]."""

    layers: dict[int, torch.Tensor]
    logits: torch.Tensor

    @property
    def logprobs(self) -> torch.Tensor:
        return self.logits.log_softmax(-1)


def residuals(program: Program) -> dict[int, int]:
    """By value, the layer behind which it is the residual stream: the last sum in front of what is next written to
    pages, or of the selection."""
    found: dict[int, int] = {}
    layer, last = -1, -1
    for part in (part for record in program.records for part in record.plain()):
        if part.op == "add":
            last = part.outputs[0]
        elif part.op in ("kv_write", "select"):
            if layer >= 0 <= last:
                found[last] = layer
            layer = part.attrs.get("layer", -1)
    return found


def walk_plain(plain: PlainOps, program: Program, step: Step) -> Walked:
    """By the references, record by record."""
    view = step.view()

    def run(record: Record, values: Tensors) -> Tensors:
        plain.run(record, view, inside := dict(values))
        return inside

    walk = _Walk(program, {program.inputs["tokens"]: view.tokens})
    walk.over(program.records, run)
    return walk.found()


def walk_fast(records: Records, step: Step) -> Walked:
    """By the backend's own, first all but the last token of each row, then those as decoding rows."""
    counts = [row.count for row in step.fed]
    first = _walk_once(records, step.part([0] * len(counts), [count - 1 for count in counts]))
    last = _walk_once(records, step.part([count - 1 for count in counts], counts))

    def together(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        pairs = zip(one.split([count - 1 for count in counts]), other.split(1), strict=True)
        return torch.cat([part for pair in pairs for part in pair])

    layers = {i: together(x, last.layers[i]) for i, x in first.layers.items()}
    return Walked(layers, together(first.logits, last.logits))


def _walk_once(records: Records, step: Step) -> Walked:
    program = records.model.program
    walk = _Walk(program, {program.inputs["tokens"]: step.view().tokens})
    body = {id(planned.record): planned for planned in records.body(step)}
    walk.over([p.record for p in body.values()], lambda record, values: records.run(body[id(record)], values))
    source, selected = next((r.inputs[0], r.outputs[0]) for r in program.records if r.op == "select")
    walk.values[selected] = walk.values[source]
    head = {id(planned.record): planned for planned in records.head(step.tokens)}
    walk.over([p.record for p in head.values()], lambda record, values: records.run(head[id(record)], values))
    return walk.found()


class _Walk:
    """Values that are still to be read, and the residual streams seen so far."""

    def __init__(self, program: Program, values: Tensors) -> None:
        self.program, self.values = program, values
        self._layers = residuals(program)
        self._streams: dict[int, torch.Tensor] = {}

    def over(self, records: Sequence[Record], run: Callable[[Record, Tensors], Tensors]) -> None:
        """Run records one after the other."""
        last = {v: i for i, record in enumerate(records) for v in record.inputs}
        for i, record in enumerate(records):
            for value in record.inputs:
                if value not in self.values:  # an order token that nobody computes
                    self.values[value] = torch.empty(0)
            made = run(record, {v: self.values[v] for v in record.inputs})
            for value, layer in self._layers.items():
                if value in made:
                    self._streams[layer] = made[value].double()
            self.values.update({v: made[v] for v in record.outputs if v in made})
            for value in record.inputs:
                if last[value] == i:
                    self.values.pop(value, None)

    def found(self) -> Walked:
        logits = self.values[self.program.outputs["logits"]].double()
        return Walked(dict(sorted(self._streams.items())), logits)


def yardstick_shape(shape: PageShape, dtype: torch.dtype) -> PageShape:
    """Pages of a plain way: narrow ones as they are, as they are part of what is asked for, else of its own type."""
    return shape if shape.dtype in NARROW_KV else replace(shape, dtype=dtype)


def layer_rows(exact: Walked, plain: Walked, fast: Walked, by: str, times: float, routed: bool) -> list[Row]:
    """A row per layer. times: one of TIMES. routed: half of the tokens count, as at a tie others choose otherwise."""
    rows = []
    for layer, wanted in exact.layers.items():
        if layer in fast.layers:
            allowed = times * off(plain.layers[layer], wanted, routed) + LEAST
            figures = (Figure("drift", off(fast.layers[layer], wanted, routed), allowed),)
            rows.append(Row("drift after each layer", f"layer {layer}", by, f"{len(wanted)} tokens", figures))
    return rows


def off(found: torch.Tensor, exact: torch.Tensor, routed: bool) -> float:
    """Root mean square of the difference over that of the values, of all tokens or the median of tokens."""
    size = exact.square().mean(-1).sqrt().clamp_min(1e-30)
    each = (found - exact).square().mean(-1).sqrt() / size
    return float(each.median() if routed else each.square().mean().sqrt())
