"""What a model asks of a checkpoint: its weights by our names, their shapes, and where each format keeps them. No
torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

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
