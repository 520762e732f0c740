"""What a model asks of a checkpoint: its weights by our names, their shapes, and where each format keeps them. No
torch."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from typing import Literal

from tokenspeed.formats.checkpoint import Checkpoint

Transform = Literal["none", "add_one", "unpermute_rope"]
"""Change on loading. add_one: a norm stored as w that multiplies by (1 + w). unpermute_rope: rows of each head
interleaved as (x0, x1) pairs, wanted as (first half, second half)."""
Kind = Literal["linear", "embedding", "vector"]


@dataclass(frozen=True)
class Source:
    """One tensor of a checkpoint that becomes the next rows of a weight. factor: times which, of vectors only.

    unpermute_rope reads `heads`, and `turned`: of each head the first so many rows are interleaved, 0 for all.
    """

    name: str
    rows: int
    transform: Transform = "none"
    heads: int = 0
    turned: int = 0
    factor: float = 1.0


@dataclass(frozen=True)
class WeightSpec:
    """One weight of the program: [rows, cols] for kind linear and embedding (rows are outputs), [cols] for vector.

    `hf` and `gguf` name the tensors that are stacked, in order, to make its rows. Vectors are kept in float32;
    linear and embedding weights stay packed as the file has them.
    """

    name: str
    shape: tuple[int, ...]
    kind: Kind
    hf: tuple[Source, ...]
    gguf: tuple[Source, ...]

    def sources(self, checkpoint: Checkpoint) -> tuple[Source, ...]:
        """Those of a checkpoint's format, by the names it has for them."""
        if checkpoint.format == "gguf":
            return self.gguf
        if is_bare(checkpoint.tensors):
            return tuple(replace(source, name=source.name.removeprefix(_BARE)) for source in self.hf)
        return self.hf


_BARE = "model."
"""What names of tensors lack where a model was saved without a head, as embedding models are."""


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

    def add(self, spec: WeightSpec) -> None:
        """Add one weight; its name must be new."""
        if spec.name in self.specs:
            raise ValueError(f"weight {spec.name} defined twice")
        self.specs[spec.name] = spec
