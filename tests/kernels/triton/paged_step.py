"""Random steps over scattered pages for the paged kernels, and float64 answers. What may not be read is NaN or -1."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from tokenspeed.kernels.triton.paged import Heads, PagedLayer
from tokenspeed.kernels.triton.view import Reach

GROUPS, LAYERS = 2, 3
"""Page groups and layers per group of every arena here."""
GROUP, LAYER = 1, 2
"""The layer the tests look at, in its group."""


@dataclass(frozen=True)
class DeviceStep:
    """A `PagedView` on the CPU."""

    positions: torch.Tensor
    slots: torch.Tensor
    block_tables: torch.Tensor
    kv: torch.Tensor
    page_size: int
    num_kv_heads: int
    head_dim: int
    items: torch.Tensor | None = None
    decode_rows: torch.Tensor | None = None
    reach: Reach = Reach.UNEVEN
    places: tuple[tuple[int, int], ...] = ((0, 0), (GROUP, LAYER))


@dataclass
class PagedCase:
    """Rows of (tokens before the step, tokens fed, padding behind them), each in a slot of its own."""

    rows: list[tuple[int, int, int]]
    heads: Heads
    page_size: int
    seed: int
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    """Per slot [2, context, kv_heads, head_dim] in the cache's dtype."""

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        self.slot_of = torch.randperm(len(self.rows) + 2, generator=self.generator)[: len(self.rows)].tolist()
        self.step = self._step()
        tokens = len(self.step.positions)
        self.q = self.random(tokens, self.heads.heads * self.heads.head_dim).to(self.dtype)

    def random(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self.generator)

    def paged(self) -> PagedLayer:
        step = self.step
        return PagedLayer(step.kv[:, LAYER], step.block_tables[GROUP], step.positions, step.slots)

    def _step(self) -> DeviceStep:
        size, (kv_heads, dim) = self.page_size, (self.heads.kv_heads, self.heads.head_dim)
        most = max(-(-(before + fed) // size) for before, fed, _ in self.rows) + 2
        count = len(self.rows) * most
        free = torch.randperm(count, generator=self.generator).tolist()
        dtype = self.kv_dtype or self.dtype
        kv = torch.full((count, LAYERS, 2, size, kv_heads, dim), torch.nan).to(dtype)
        tables = torch.full((GROUPS, len(self.rows) + 2, most), -1, dtype=torch.int32)
        positions, slots = [], []
        for slot, (before, fed, padding) in zip(self.slot_of, self.rows, strict=True):
            end = before + fed
            first = max(0, before - self.heads.window + 1) if self.heads.window else 0
            entries = self.random(2, end, kv_heads, dim).to(dtype)
            self.keys[slot] = entries
            for page in range(first // size, -(-end // size)):
                tables[GROUP, slot, page] = free.pop()
            for p in range(first, end):
                kv[int(tables[GROUP, slot, p // size]), LAYER, :, p % size] = entries[:, p]
            positions += [*range(before, end), *[0] * padding]
            slots += [slot] * fed + [-1] * padding
        return DeviceStep(
            torch.tensor(positions, dtype=torch.int32), torch.tensor(slots, dtype=torch.int32), tables, kv, size,
            kv_heads, dim,
        )  # fmt: skip

    def answer(self, sinks: torch.Tensor | None = None) -> torch.Tensor:
        """Attention of every token in float64; zeros for padding."""
        shape, out = self.heads, torch.zeros_like(self.q, dtype=torch.float64)
        for i, (p, slot) in enumerate(zip(self.step.positions.tolist(), self.step.slots.tolist(), strict=True)):
            if slot < 0:
                continue
            first = max(0, p - shape.window + 1) if shape.window else 0
            keys, values = self.keys[slot][:, first : p + 1].double().repeat_interleave(shape.group, dim=2)
            keys, values = keys * shape.kv_scale.key, values * shape.kv_scale.value
            scores = torch.einsum("hd,nhd->hn", self.q[i].double().view(shape.heads, -1), keys) * shape.scale
            if shape.softcap:
                scores = shape.softcap * torch.tanh(scores / shape.softcap)
            if sinks is not None:
                scores = torch.cat((scores, sinks.double()[:, None]), dim=1)
            weights = scores.softmax(-1)[:, : len(keys)]
            out[i] = torch.einsum("hn,nhd->hd", weights, values).flatten()
        return out


def tolerance(dtype: torch.dtype) -> float:
    """Absolute, for outputs of unit scale: float32 sums of some hundred terms; half precision rounds weights too."""
    return 3e-6 if dtype == torch.float32 else 4e-3


def check(out: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=tolerance(dtype))
