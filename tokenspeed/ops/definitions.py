"""The op vocabulary: what each op takes and gives, and what it must move and compute. No torch here.

A shape is a tuple of ints and of the symbols TOKENS (tokens fed by the step) and ROWS (tokens whose logits are wanted).
The torch reference of each op lies in `ops.reference`, under the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

TOKENS = "T"
ROWS = "R"
Dim = int | str
Shape = tuple[Dim, ...]
Attrs = Mapping[str, Any]


KV_ITEM_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "fp8": 1, "fp8_e4m3": 1}
"""Bytes of an element by the names of --kv-cache-dtype."""
KV_GROUP = 32
"""Columns of an int8 entry that share a scale."""


def kv_entry_bytes(dtype: str, head_dim: int) -> int:
    """Bytes of one key or value of one head in a KV page; an int8 entry ends with its bfloat16 scales, aligned to 2."""
    if dtype != "int8":
        return KV_ITEM_BYTES[dtype] * head_dim
    return head_dim + head_dim % 2 + 2 * -(-head_dim // KV_GROUP)


class KvScale(NamedTuple):
    """What keys and values of an fp8 page are to be multiplied by; they are stored over it."""

    key: float = 1.0
    value: float = 1.0

    @property
    def key_inverse(self) -> float:
        return 1.0 / self.key

    @property
    def value_inverse(self) -> float:
        return 1.0 / self.value


UNSCALED = KvScale()


@dataclass(frozen=True)
class Cost:
    """Bytes that must cross the memory bus and operations that must be done, for one record of one step."""

    weight_bytes: float = 0
    kv_bytes: float = 0
    act_bytes: float = 0
    flops: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.weight_bytes + other.weight_bytes,
            self.kv_bytes + other.kv_bytes,
            self.act_bytes + other.act_bytes,
            self.flops + other.flops,
        )

    @property
    def bytes(self) -> float:
        """Weight and KV bytes: those no fusion can avoid. Activations may stay in a cache and are counted apart."""
        return self.weight_bytes + self.kv_bytes


@dataclass(frozen=True)
class Workload:
    """The step a cost is asked for: `batch` sequences, each feeding tokens/batch tokens and then holding `context`.

    act_bytes, kv_bytes: bytes per activation and KV element, scales included. weight_bytes: bytes of a stored weight by
    name.
    """

    tokens: int
    rows: int
    batch: int
    context: int
    act_bytes: float
    kv_bytes: float
    weight_bytes: Mapping[str, float]

    def size(self, shape: Shape) -> int:
        """Number of elements of a symbolic shape."""
        total = 1
        for dim in shape:
            total *= self.tokens if dim == TOKENS else self.rows if dim == ROWS else int(dim)
        return total


@dataclass(frozen=True)
class Operands:
    """Shapes of a record's inputs and outputs, and names and shapes of its weights."""

    inputs: tuple[Shape, ...]
    outputs: tuple[Shape, ...]
    weights: tuple[str, ...]
    weight_shapes: tuple[tuple[int, ...], ...]
    attrs: Attrs


Infer = Callable[[tuple[Shape, ...], tuple[tuple[int, ...], ...], Attrs], tuple[Shape, ...]]
CostRule = Callable[[Operands, Workload], Cost]


@dataclass(frozen=True)
class OpDef:
    """One op: its shape rule, its cost rule, and whether its outputs are views of its first input."""

    name: str
    infer: Infer
    cost: CostRule
    view: bool = False


def _same(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    return (inputs[0],)


def _elementwise(op: Operands, work: Workload) -> Cost:
    elements = sum(work.size(shape) for shape in op.inputs + op.outputs)
    return Cost(
        weight_bytes=sum(work.weight_bytes[name] for name in op.weights),
        act_bytes=elements * work.act_bytes,
        flops=4 * work.size(op.outputs[0]),
    )


def _embed_infer(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    return ((*inputs[0], weights[0][1]),)


def _embed_cost(op: Operands, work: Workload) -> Cost:
    rows, cols = op.weight_shapes[0]
    row_bytes = work.weight_bytes[op.weights[0]] / rows
    return Cost(weight_bytes=work.tokens * row_bytes, act_bytes=work.tokens * cols * work.act_bytes)


def _linear_infer(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    if inputs[0][-1] != weights[0][1]:
        raise ValueError(f"linear: input has {inputs[0][-1]} columns, weight {weights[0]}")
    return ((*inputs[0][:-1], weights[0][0]),)


def _linear_cost(op: Operands, work: Workload) -> Cost:
    moved = work.size(op.inputs[0]) + work.size(op.outputs[0])
    return Cost(
        weight_bytes=sum(work.weight_bytes[name] for name in op.weights),
        act_bytes=moved * work.act_bytes,
        flops=2 * work.size(op.inputs[0]) * op.weight_shapes[0][0],
    )


def _split_infer(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    sizes: tuple[int, ...] = attrs["sizes"]
    if sum(sizes) != inputs[0][-1]:
        raise ValueError(f"split: sizes {sizes} do not add up to {inputs[0][-1]}")
    return tuple((*inputs[0][:-1], size) for size in sizes)


def _free(op: Operands, work: Workload) -> Cost:
    return Cost()


def _rope_infer(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    return inputs


def _act_mul_infer(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    return ((*inputs[0][:-1], int(inputs[0][-1]) // 2),)


def _kv_write_infer(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    return ((),)


def _kv_write_cost(op: Operands, work: Workload) -> Cost:
    elements = sum(work.size(shape) for shape in op.inputs)
    return Cost(kv_bytes=elements * work.kv_bytes, act_bytes=elements * work.act_bytes)


def _attention_cost(op: Operands, work: Workload) -> Cost:
    """KV of every sequence read once, queries against it; a query sees half of the step's own tokens on average."""
    attrs = op.attrs
    per_sequence = work.tokens / work.batch
    window = attrs["window"] or work.context
    read = min(work.context, window + per_sequence - 1)
    seen = min(work.context - (per_sequence - 1) / 2, window)
    return Cost(
        weight_bytes=sum(work.weight_bytes[name] for name in op.weights),
        kv_bytes=work.batch * read * 2 * attrs["kv_heads"] * attrs["head_dim"] * work.kv_bytes,
        act_bytes=2 * work.size(op.inputs[0]) * work.act_bytes,
        flops=4 * work.tokens * seen * attrs["heads"] * attrs["head_dim"],
    )


def _attention_infer(
    inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs
) -> tuple[Shape, ...]:
    return (inputs[0],)


def _select_infer(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    return ((ROWS, *inputs[0][1:]),)


def _select_cost(op: Operands, work: Workload) -> Cost:
    return Cost(act_bytes=2 * work.size(op.outputs[0]) * work.act_bytes)


def _route_infer(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    experts, groups = int(inputs[0][-1]), attrs["groups"]
    if not 0 < attrs["k"] <= experts or experts % groups or not 0 < attrs["kept_groups"] <= groups:
        raise ValueError(f"route: {attrs} do not fit {experts} experts")
    chosen = (*inputs[0][:-1], attrs["k"])
    return chosen, chosen


def _experts_infer(inputs: tuple[Shape, ...], weights: tuple[tuple[int, ...], ...], attrs: Attrs) -> tuple[Shape, ...]:
    (experts, rows, cols), down = weights[:2]
    if inputs[0][-1] != cols or down != (experts, cols, rows // 2) or inputs[1] != inputs[2]:
        raise ValueError(f"experts: weights {weights} do not fit inputs {inputs}")
    return (inputs[0],)


def distinct_experts(experts: int, k: int, tokens: int) -> float:
    """How many of `experts` are expected to be chosen by at least one of `tokens`, if each chooses k of them uniformly
    and on its own: E (1 - (1 - k / E)^T)."""
    return experts * (1 - (1 - k / experts) ** tokens)


def _experts_cost(op: Operands, work: Workload) -> Cost:
    experts, rows, cols = op.weight_shapes[0]
    k = int(op.inputs[1][-1])
    read = distinct_experts(experts, k, work.tokens) / experts
    return Cost(
        weight_bytes=read * sum(work.weight_bytes[name] for name in op.weights),
        act_bytes=(work.size(op.inputs[0]) + work.size(op.outputs[0])) * work.act_bytes,
        flops=2 * work.tokens * k * (rows + rows // 2) * cols,
    )


OPS: dict[str, OpDef] = {
    op.name: op
    for op in (
        OpDef("embed", _embed_infer, _embed_cost),
        OpDef("norm", _same, _elementwise),
        OpDef("linear", _linear_infer, _linear_cost),
        OpDef("split", _split_infer, _free, view=True),
        OpDef("rope", _rope_infer, _elementwise),
        OpDef("kv_write", _kv_write_infer, _kv_write_cost),
        OpDef("attention", _attention_infer, _attention_cost),
        OpDef("add", _same, _elementwise),
        OpDef("act_mul", _act_mul_infer, _elementwise),
        OpDef("softcap", _same, _elementwise),
        OpDef("route", _route_infer, _elementwise),
        OpDef("experts", _experts_infer, _experts_cost),
        OpDef("select", _select_infer, _select_cost),
    )
}
"""embed: token ids to rows of a table, times `scale`.
norm: RMS norm over the last axis, or over each head of `per_head` columns.
linear: x W^T (+ bias, a second weight).
split: views of consecutive columns.
rope: rotates query and key heads by position.
kv_write: puts keys and values into the pages of `layer`; gives an order token, without elements of its own. Where it
has a `kv_scale`, a `KvScale`, they are stored over it, and attention, which then has it too, multiplies by it.
attention: causal, paged, grouped queries, optional window, optional soft cap of scores; a weight, where there is one,
is the sinks: for each query head a score that takes part in the softmax and has no value.
add: a + b. act_mul: act(left half) * right half. softcap: cap * tanh(x / cap).
route: scores of all experts (and a weight, a bias that takes part in choosing alone) to the ids [T, k] int32 and the
weights [T, k] float32 of the chosen ones.
experts: of the experts chosen for each row, the gated MLPs down(act(gate x, up x)), weighted and added up. Weights are
gate_up [E, 2 F, H], gates first, and down [E, H, F], then their biases [E, 2 F] and [E, H] where there are any.
select: the rows whose logits are wanted."""
