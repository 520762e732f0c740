"""The dense ops of a GPU as implementations: projections with what is fused around them, norms, activations, rows.

An implementation is called as run(view, record, inputs, weights) and returns the record's outputs in order. inputs are
[T, columns] on the device; weights are float32 vectors, matrices [N, K] in the compute dtype, or narrow ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Protocol, TypeVar

import torch

from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.kernels.triton import norm as row_kernels
from tokenspeed.kernels.triton.invariant_linear import project_invariant
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.operands import Matrix, Norm, Prologue
from tokenspeed.kernels.triton.tiles import SMALL_ROWS
from tokenspeed.ops.definitions import Attrs, Operands
from tokenspeed.quantization.fp8 import FORMAT as FP8_FORMAT
from tokenspeed.quantization.narrow import PACKED_FORMATS

DTYPES = ("bfloat16", "float16", "float32")
PRIORITY = 10
JOINS = ("join_norm", "branch_join_norm")
PROJECTIONS = ("linear_act", "norm_linear", "join_norm_linear", "branch_join_norm_linear")
FUSED = (*PROJECTIONS, *(f"{op}_act" for op in PROJECTIONS[1:]))

Outputs = tuple[torch.Tensor, ...]
T = TypeVar("T", bound="Node")


class Node(Protocol):
    """What is read of a program's record."""

    @property
    def op(self) -> str: ...
    @property
    def inputs(self) -> tuple[int, ...]: ...
    @property
    def outputs(self) -> tuple[int, ...]: ...
    @property
    def weights(self) -> tuple[str, ...]: ...
    @property
    def attrs(self) -> Attrs: ...
    def plain(self: T) -> Iterator[T]: ...


Run = Callable[[object, Node, Sequence[torch.Tensor], Sequence[Matrix]], Outputs]
Project = Callable[
    [torch.Tensor, Matrix, torch.Tensor | None, str, Prologue | None], tuple[torch.Tensor, torch.Tensor | None]
]


def register(registry: Registry, *, fp8: bool = True) -> None:
    """Add the dense ops of backend "triton". fp8: whether the device multiplies e4m3 (CUDA from 8.9 on, gfx950)."""

    def takes(operands: Operands, situation: Situation) -> bool:
        return _takes(operands, situation, fp8)

    def takes_fused(operands: Operands, situation: Situation) -> bool:
        narrow = any(_is_narrow(name, situation.formats) for name in operands.weights)
        return takes(operands, situation) and (narrow or situation.tokens <= SMALL_ROWS)

    def takes_table(operands: Operands, situation: Situation) -> bool:
        return takes(operands, situation) and not _is_narrow(operands.weights[0], situation.formats)

    def takes_apart(operands: Operands, situation: Situation) -> bool:
        return situation.batch_invariant and takes(operands, situation)

    rows: dict[str, Run] = {"norm": run_norm, "add": run_add, "act_mul": run_act_mul}
    for op, run in (rows | dict.fromkeys(JOINS, run_join_norm)).items():
        registry.add(Implementation(f"triton.{op}", op, "triton", run, takes, PRIORITY, invariant=True))
    registry.add(Implementation("triton.embed", "embed", "triton", run_embed, takes_table, PRIORITY, invariant=True))
    registry.add(Implementation("triton.linear", "linear", "triton", run_projection, takes, PRIORITY))
    same = partial(run_projection, project=project_invariant)
    for op in ("linear", *FUSED):
        registry.add(Implementation(f"invariant.{op}", op, "triton", same, takes_apart, PRIORITY, invariant=True))
    for op in FUSED:
        registry.add(Implementation(f"triton.{op}", op, "triton", run_projection, takes_fused, PRIORITY))


def _takes(operands: Operands, situation: Situation, fp8: bool) -> bool:
    matrices = [name for name, shape in zip(operands.weights, operands.weight_shapes, strict=True) if len(shape) > 1]
    known = situation.device == "cuda" and situation.dtype in DTYPES
    return known and (fp8 or not any(_is_fp8(name, situation.formats) for name in matrices))


def run_projection(
    view: object,
    record: Node,
    inputs: Sequence[torch.Tensor],
    weights: Sequence[Matrix],
    project: Project = project,
) -> Outputs:
    """linear with any of: norm or join before it, activation after it. project: as `linear.project`."""
    values, named = dict(zip(record.inputs, inputs, strict=True)), dict(zip(record.weights, weights, strict=True))
    parts = list(record.plain())
    linear = next(part for part in parts if part.op == "linear")
    acts = [part for part in parts if part.op == "act_mul"]
    x, prologue = prologue_of(parts, values, named)
    bias = _vector(named, linear.weights[1]) if len(linear.weights) > 1 else None
    act = acts[0].attrs["act"] if acts else "none"
    y, joined = project(x, named[linear.weights[0]], bias, act, prologue)
    return outputs_of(record, parts, {parts[-1].outputs[0]: y}, joined)


def run_join_norm(view: object, record: Node, inputs: Sequence[torch.Tensor], weights: Sequence[Matrix]) -> Outputs:
    """Residual add, its branch normed or not, and a norm of the sum."""
    values, named = dict(zip(record.inputs, inputs, strict=True)), dict(zip(record.weights, weights, strict=True))
    parts = list(record.plain())
    x, prologue = prologue_of(parts, values, named)
    assert prologue is not None
    y, joined = row_kernels.norm_rows(x, prologue.norm, prologue.branch, prologue.branch_norm)
    return outputs_of(record, parts, {parts[-1].outputs[0]: y.values}, joined)


def run_norm(view: object, record: Node, inputs: Sequence[torch.Tensor], weights: Sequence[Matrix]) -> Outputs:
    """RMS norm of rows or of heads."""
    norm = _norm(record, dict(zip(record.weights, weights, strict=True)))
    if record.attrs["per_head"]:
        return (row_kernels.norm_heads(inputs[0], norm),)
    return (row_kernels.norm_rows(inputs[0], norm)[0].values,)


def run_add(view: object, record: Node, inputs: Sequence[torch.Tensor], weights: Sequence[Matrix]) -> Outputs:
    """a + b."""
    return (row_kernels.add_rows(inputs[0], inputs[1]),)


def run_act_mul(view: object, record: Node, inputs: Sequence[torch.Tensor], weights: Sequence[Matrix]) -> Outputs:
    """act(left half) * right half."""
    return (row_kernels.act_mul(inputs[0], record.attrs["act"]),)


def run_embed(view: object, record: Node, inputs: Sequence[torch.Tensor], weights: Sequence[Matrix]) -> Outputs:
    """Rows of a table for token ids, times a scale."""
    table = weights[0]
    assert isinstance(table, torch.Tensor)
    return (row_kernels.embed_rows(inputs[0], table, record.attrs["scale"]),)


def prologue_of(
    parts: Sequence[Node], values: Mapping[int, torch.Tensor], named: Mapping[str, Matrix]
) -> tuple[torch.Tensor, Prologue | None]:
    """The rows that enter, and what happens to them before the product."""
    norms = [part for part in parts if part.op == "norm"]
    if not norms:
        return values[parts[0].inputs[0]], None
    norm = _norm(norms[-1], named)
    add = next((part for part in parts if part.op == "add"), None)
    if add is None:
        return values[norms[-1].inputs[0]], Prologue(norm)
    x, branch = add.inputs
    if len(norms) == 1:
        return values[x], Prologue(norm, values[branch])
    normed = norms[0]
    if x == normed.outputs[0]:
        x = branch
    return values[x], Prologue(norm, values[normed.inputs[0]], _norm(normed, named))


def outputs_of(
    record: Node, parts: Sequence[Node], made: dict[int, torch.Tensor], joined: torch.Tensor | None
) -> Outputs:
    """A record's outputs in order, from values by number and the sum where a branch was joined."""
    if joined is not None:
        made[next(part for part in parts if part.op == "add").outputs[0]] = joined
    return tuple(made[value] for value in record.outputs)


def _norm(record: Node, named: Mapping[str, Matrix]) -> Norm:
    return Norm(_vector(named, record.weights[0]), record.attrs["eps"])


def _vector(named: Mapping[str, Matrix], name: str) -> torch.Tensor:
    vector = named[name]
    assert isinstance(vector, torch.Tensor)
    return vector


def _is_fp8(name: str, formats: Mapping[str, tuple[str, ...]]) -> bool:
    return FP8_FORMAT in formats.get(name, ())


def _is_narrow(name: str, formats: Mapping[str, tuple[str, ...]]) -> bool:
    return not PACKED_FORMATS.isdisjoint(formats.get(name, ())) or _is_fp8(name, formats)
