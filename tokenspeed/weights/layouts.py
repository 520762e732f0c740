"""Which of a model's matrices a checkpoint holds quantised, and in which tensors. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.formats.checkpoint import Checkpoint, TensorInfo
from tokenspeed.formats.quantized.layout import Layout, Rule, module_of
from tokenspeed.quantization.groups import HEADS, PLAIN
from tokenspeed.weights.spec import Source, WeightSpec, WeightTable

ZERO_BIAS = ("gptq", "awq")
"""Methods whose tools write biases of zeros where a model has none."""


@dataclass(frozen=True)
class Stored:
    """A quantised matrix of a checkpoint. tensors: names by suffix, of those that must be there or are."""

    layout: Layout
    rows: int
    cols: int
    rules: dict[str, Rule]
    tensors: dict[str, str]


def stored_matrix(table: WeightTable, spec: WeightSpec, source: Source, checkpoint: Checkpoint) -> Stored | None:
    """How a checkpoint holds the rows of a source where it holds them quantised, as its config says; None where not.

    Raises UnsupportedError naming a matrix that the layout has no place for.
    """
    layout = None if table.quantization is None else table.quantization.layout_of(module_of(source.name))
    if layout is None or spec.kind == "vector" or checkpoint.format == "gguf":
        return None
    plain = checkpoint.tensors.get(source.name)
    if layout.tensor(source.name, layout.marker) not in checkpoint.tensors:
        expected = spec.kind in ("linear", "experts") and spec.name not in HEADS
        if (plain is None and not expected) or (plain is not None and plain.dtype in PLAIN):
            return None
    return _stored(layout, spec, source, checkpoint)


def _stored(layout: Layout, spec: WeightSpec, source: Source, checkpoint: Checkpoint) -> Stored:
    try:
        rules = layout.rules(source.rows, spec.cols)
    except UnsupportedError as error:
        raise UnsupportedError(f"{checkpoint.path}: {source.name}: {error}") from None
    named = {suffix: layout.tensor(source.name, suffix) for suffix in rules}
    there = {suffix: name for suffix, name in named.items() if rules[suffix].needed or name in checkpoint.tensors}
    return Stored(layout, source.rows, spec.cols, rules, there)


def tensors_of(table: WeightTable, spec: WeightSpec, source: Source, checkpoint: Checkpoint) -> tuple[str, ...]:
    """The tensors that a source is read from."""
    stored = stored_matrix(table, spec, source, checkpoint)
    return (source.name,) if stored is None else tuple(stored.tensors.values())


def source_bytes(checkpoint: Checkpoint, table: WeightTable, spec: WeightSpec, source: Source) -> int:
    """Bytes that the rows of a source take in the checkpoint, scales included."""
    stored = stored_matrix(table, spec, source, checkpoint)
    if stored is None:
        return spec.source_bytes(source, checkpoint.tensors[source.name])
    return sum(checkpoint.tensors[name].nbytes for name in stored.tensors.values())


def planned_bytes(table: WeightTable, spec: WeightSpec) -> int | None:
    """Bytes of a weight as its config alone says, None where that leaves it plain."""
    if table.quantization is None or spec.kind not in ("linear", "experts") or spec.name in HEADS:
        return None
    layouts = [(table.quantization.layout_of(module_of(source.name)), source.rows) for source in spec.hf]
    if any(layout is None for layout, _ in layouts):
        return None
    return sum(layout.nbytes(rows, spec.cols) for layout, rows in layouts if layout is not None)


def misfits(stored: Stored, source: Source, checkpoint: Checkpoint) -> Iterator[tuple[str, TensorInfo, Rule]]:
    """What is wrong, shape or type, with which tensors that are there."""
    for suffix, name in stored.tensors.items():
        info, rule = checkpoint.tensors[name], stored.rules[suffix]
        if _matrix_shape(info.shape, source) not in rule.shapes:
            yield "shape", info, rule
        if info.dtype not in rule.dtypes:
            yield "type", info, rule


def _matrix_shape(shape: tuple[int, ...], source: Source) -> tuple[int, ...]:
    """Of a tensor of all experts the shape without their axis."""
    if len(source.shape) == 3 and shape[:1] == source.shape[:1] and len(shape) > 2:
        return (shape[0] * shape[1], *shape[2:])
    return shape


def is_unread(table: WeightTable, name: str, checkpoint: Checkpoint) -> bool:
    """Whether a tensor that no weight reads may be there: a scale of activations, or a bias of zeros."""
    quantization = table.quantization
    if quantization is None:
        return False
    if any(fnmatchcase(name, pattern) for pattern in quantization.unread):
        return True
    return quantization.method in ZERO_BIAS and name.endswith(".bias") and not checkpoint.data(name).any()
