"""What a model asks of a checkpoint: its weights by our names, their shapes, and where each format keeps them. No
torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from math import prod
from typing import Literal

from tokenspeed.formats.checkpoint import Checkpoint, TensorInfo
from tokenspeed.formats.quantized.layout import Quantization

Transform = Literal["none", "add_one", "unpermute_rope"]
"""Change on loading. add_one: a norm stored as w that multiplies by (1 + w). unpermute_rope: rows of each head
interleaved as (x0, x1) pairs, wanted as (first half, second half); so may be the gate and up rows of an expert."""
Kind = Literal["linear", "router", "experts", "embedding", "vector"]
"""A router is a linear weight that `--quantization` leaves alone; experts are linear weights, one after the other."""


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint that becomes the next rows of a weight. factor: times which, of vectors only.

    unpermute_rope reads `heads`, and `turned`: of each head the first so many rows are interleaved, 0 for all.
    first, shape: a tensor of more rows, or of more dimensions, has this shape, and the rows begin at `first` of it; all
    dimensions but the last count as rows. transposed: each of its matrices is wanted the other way round, `shape` is
    how the file has it and all its rows are taken. Rows of a vector are its elements.
    """

    name: str
    rows: int
    transform: Transform = "none"
    heads: int = 0
    turned: int = 0
    factor: float = 1.0
    first: int = 0
    shape: tuple[int, ...] = ()
    transposed: bool = False


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the program: [rows, cols] for kind linear, router and embedding (rows are outputs), [experts, rows,
    cols] for experts, any shape for vector.

    `hf` and `gguf` name the tensors that are stacked, in order, to make its rows; `hf_stacked` those that make it where
    a checkpoint holds all experts in one. Vectors are kept in float32; other weights stay packed as the file has them.
    dummy_format: of random values, those of vectors aside.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    hf: tuple[Source, ...]
    gguf: tuple[Source, ...]
    hf_stacked: tuple[Source, ...] = ()
    dummy_format: str = "BF16"

    @property
    def rows(self) -> int:
        """Of a vector, its elements; of experts, the rows of all."""
        return prod(self.shape) if self.kind == "vector" else prod(self.shape[:-1])

    @property
    def cols(self) -> int:
        """Of a vector, those of all its elements in one row."""
        return prod(self.shape) if self.kind == "vector" else self.shape[-1]

    def tensor_shape(self, source: Source) -> tuple[int, ...]:
        """The shape that a tensor must have."""
        return source.shape or ((source.rows,) if self.kind == "vector" else (source.rows, self.cols))

    def sources(self, checkpoint: Checkpoint) -> tuple[Source, ...]:
        """Where a checkpoint keeps it, by the names it has there."""
        if checkpoint.format == "gguf":
            return self.gguf
        bare = is_bare(checkpoint.tensors)
        plain, stacked = (_named(sources, bare) for sources in (self.hf, self.hf_stacked))
        return stacked if stacked and stacked[0].name in checkpoint.tensors else plain

    def source_bytes(self, source: Source, info: TensorInfo) -> int:
        """Bytes that the rows of one source take in the file."""
        if source.transposed:
            return info.nbytes
        shape = self.tensor_shape(source)
        return info.nbytes * source.rows // prod(shape if self.kind == "vector" else shape[:-1])


_BARE = "model."
"""What names of tensors lack where a model was saved without a head, as embedding models are."""


def _named(sources: tuple[Source, ...], bare: bool) -> tuple[Source, ...]:
    return tuple(replace(source, name=source.name.removeprefix(_BARE)) for source in sources) if bare else sources


def is_bare(tensors: Collection[str]) -> bool:
    """Whether names of a safetensors checkpoint are those of a model without a head."""
    return "embed_tokens.weight" in tensors


@dataclass
class WeightTable:
    """Every weight of a model, and the checkpoint tensors it may leave unread."""

    specs: dict[str, WeightSpec] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()
    """Patterns (fnmatch) of tensors that a checkpoint may hold and this model does not read, such as rope
    frequencies."""
    quantization: Quantization | None = None
    """How a safetensors checkpoint keeps matrices, where its config says that they are quantised."""

    def add(self, spec: WeightSpec) -> None:
        """Add one weight; its name must be new."""
        if spec.name in self.specs:
            raise ValueError(f"weight {spec.name} defined twice")
        self.specs[spec.name] = spec
