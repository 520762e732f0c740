"""Writes a model's weight table: each weight with its shape and its names in both formats."""

from __future__ import annotations

from tokenspeed.models.dense import DenseConfig
from tokenspeed.weights.kv_scales import KV_SCALE_TENSORS
from tokenspeed.weights.spec import Kind, Source, Transform, WeightSpec, WeightTable


class Table:
    """Builds the weight table: a name of ours, the shape, and the names in both formats."""

    def __init__(self, cfg: DenseConfig) -> None:
        self.cfg = cfg
        unread = ("rope_freqs.weight", "rope_factors_*.weight", "*.rotary_emb.inv_freq")
        self.table = WeightTable(ignored=unread + KV_SCALE_TENSORS)

    def vector(self, name: str, hf: list[Source], gguf: list[Source]) -> None:
        size = sum(source.rows for source in hf)
        self.table.add(WeightSpec(name, (size,), "vector", tuple(hf), tuple(gguf)))

    def norm(self, name: str, size: int, hf: str, gguf: str, factor: float = 1.0) -> None:
        plus_one: Transform = "add_one" if self.cfg.norm_plus_one else "none"
        source = Source(f"{hf}.weight", size, plus_one, factor=factor)
        self.vector(name, [source], [Source(f"{gguf}.weight", size, factor=factor)])

    def matrix(self, name: str, cols: int, hf: list[Source], gguf: list[Source], kind: Kind = "linear") -> None:
        rows = sum(source.rows for source in hf)
        self.table.add(WeightSpec(name, (rows, cols), kind, tuple(hf), tuple(gguf)))

    def plain(
        self, name: str, rows: int, cols: int, hf: str, gguf: str, kind: Kind = "linear", bias: bool = False
    ) -> None:
        self.matrix(name, cols, [Source(f"{hf}.weight", rows)], [Source(f"{gguf}.weight", rows)], kind)
        if bias:
            self.vector(f"{name}_bias", [Source(f"{hf}.bias", rows)], [Source(f"{gguf}.bias", rows)])
