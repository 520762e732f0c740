"""From a checkpoint and a model's weight table to weights: match names and shapes, transform, copy nothing else."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from math import prod

import torch

from tokenspeed.contracts.errors import UnsupportedError, WeightError
from tokenspeed.formats.blocks import BLOCKS, SUPPORTED, row_bytes
from tokenspeed.formats.checkpoint import Checkpoint
from tokenspeed.quantization.unpack import unpack
from tokenspeed.weights.layouts import is_unread, misfits, source_bytes, stored_matrix, tensors_of
from tokenspeed.weights.packed import PLAIN_BYTES, PackedTensor, Weight, share_bytes, unpermute_rope, vector_weight
from tokenspeed.weights.spec import Source, WeightSpec, WeightTable
from tokenspeed.weights.stored import stored_rows

Progress = Callable[[int, int], None]
"""Called with bytes done and bytes in total."""

_MAX_LISTED = 20


def load_weights(checkpoint: Checkpoint, table: WeightTable, progress: Progress | None = None) -> dict[str, Weight]:
    """Every weight of the table, by its name, in CPU memory.

    Matrices are views of the checkpoint's map (bytes are read when they are first used); vectors are float32 copies.
    Two weights may name the same tensor.

    Raises WeightError naming tensors that are missing, surplus (read by no weight and matching no `ignored` pattern) or
    of another shape, UnsupportedError naming tensors of a type that cannot be unpacked.
    """
    sources = {name: _sources(spec, checkpoint) for name, spec in table.specs.items()}
    _check_names(checkpoint, table, sources)
    _check_tensors(checkpoint, table, sources)
    nbytes = {name: _nbytes(checkpoint, table, name, parts) for name, parts in sources.items()}
    total = sum(nbytes.values())
    weights: dict[str, Weight] = {}
    done = 0
    for name, spec in table.specs.items():
        parts = sources[name]
        if spec.kind == "vector":
            weights[name] = _load_vector(checkpoint, spec, parts)
        else:
            weights[name] = Weight(spec, [_load_rows(checkpoint, table, spec, source) for source in parts])
        done += nbytes[name]
        if progress is not None:
            progress(done, total)
    return weights


def _sources(spec: WeightSpec, checkpoint: Checkpoint) -> tuple[Source, ...]:
    sources = spec.sources(checkpoint)
    if not sources or sum(source.rows for source in sources) != spec.rows:
        raise ValueError(f"weight {spec.name}: its {checkpoint.format} sources do not add up to shape {spec.shape}")
    if spec.kind != "vector" and any(source.transform == "add_one" or source.factor != 1 for source in sources):
        raise ValueError(f"weight {spec.name}: add_one and factors are for vectors only, it is a {spec.kind}")
    return sources


def _nbytes(checkpoint: Checkpoint, table: WeightTable, name: str, sources: tuple[Source, ...]) -> int:
    return sum(source_bytes(checkpoint, table, table.specs[name], source) for source in sources)


def _check_names(checkpoint: Checkpoint, table: WeightTable, sources: dict[str, tuple[Source, ...]]) -> None:
    wanted = dict.fromkeys(
        tensor
        for name, parts in sources.items()
        for source in parts
        for tensor in tensors_of(table, table.specs[name], source, checkpoint)
    )
    missing = [name for name in wanted if name not in checkpoint.tensors]
    surplus = [
        name
        for name in checkpoint.tensors
        if name not in wanted
        and not any(fnmatchcase(name, pattern) for pattern in table.ignored)
        and not is_unread(table, name, checkpoint)
    ]
    problems = [f"{kind} {_listed(names)}" for kind, names in (("lacks", missing), ("has surplus", surplus)) if names]
    if problems:
        raise WeightError(f"{checkpoint.path}: the checkpoint does not fit the model: it {' and it '.join(problems)}")


def _check_tensors(checkpoint: Checkpoint, table: WeightTable, sources: dict[str, tuple[Source, ...]]) -> None:
    wrong: dict[str, None] = {}
    unsupported: dict[str, None] = {}
    for weight, parts in sources.items():
        for source in parts:
            stored = stored_matrix(table, table.specs[weight], source, checkpoint)
            if stored is not None:
                for what, info, rule in misfits(stored, source, checkpoint):
                    if what == "shape":
                        wrong[f"{info.name!r} {list(info.shape)} instead of {list(rule.shapes[0])}"] = None
                    else:
                        unsupported[f"{info.name!r} of type {info.dtype} (wanted: {' or '.join(rule.dtypes)})"] = None
                continue
            info = checkpoint.tensors[source.name]
            shape = table.specs[weight].tensor_shape(source)
            if info.shape != shape:
                wrong[f"{info.name!r} {list(info.shape)} instead of {list(shape)}"] = None
            if info.dtype not in (PLAIN_BYTES if source.transposed else BLOCKS):
                unsupported[f"{info.name!r} of type {info.dtype}"] = None
    if wrong:
        raise WeightError(f"{checkpoint.path}: wrong shape of {_listed(list(wrong), quote=False)}")
    if unsupported:
        raise UnsupportedError(
            f"{checkpoint.path}: cannot load {_listed(list(unsupported), quote=False)} (supported types: {SUPPORTED})"
        )


def _listed(items: list[str], quote: bool = True) -> str:
    shown = ", ".join(repr(item) if quote else item for item in items[:_MAX_LISTED])
    more = f", ... ({len(items)} in all)" if len(items) > _MAX_LISTED else ""
    return f"{len(items)} tensor{'s' if len(items) > 1 else ''}: {shown}{more}"


def _load_rows(checkpoint: Checkpoint, table: WeightTable, spec: WeightSpec, source: Source) -> PackedTensor:
    stored = stored_matrix(table, spec, source, checkpoint)
    if stored is not None:
        return stored_rows(stored, source, checkpoint)
    info = checkpoint.tensors[source.name]
    width = row_bytes(info.dtype, spec.cols)
    mapped = checkpoint.data(info.name)[source.first * width : (source.first + source.rows) * width]
    return PackedTensor(
        share_bytes(mapped).view(source.rows, width),
        info.dtype,
        source.rows,
        spec.cols,
        heads=source.heads if source.transform == "unpermute_rope" else 0,
        turned=source.turned,
        mapped=mapped,
        exchanged=prod(info.shape[:-2]) if source.transposed else 0,
    )


def _load_vector(checkpoint: Checkpoint, spec: WeightSpec, sources: tuple[Source, ...]) -> Weight:
    parts = []
    for source in sources:
        info = checkpoint.tensors[source.name]
        row = PackedTensor(share_bytes(checkpoint.data(info.name)).unsqueeze(0), info.dtype, 1, prod(info.shape))
        values = unpack(row.rows_at(0, 1), info.dtype, row.cols, torch.float32)[0]
        values = values[source.first : source.first + source.rows]
        if source.transform == "add_one":
            values += 1
        elif source.transform == "unpermute_rope":
            values = unpermute_rope(values, source.heads, source.turned)
        parts.append(values * source.factor if source.factor != 1 else values)
    return vector_weight(spec, torch.cat(parts) if len(parts) > 1 else parts[0])
