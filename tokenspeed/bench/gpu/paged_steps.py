"""Random steps over scattered pages on a device, for timing and checking the paged kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from tokenspeed.kernels.triton.attention_tiles import max_items
from tokenspeed.kernels.triton.paged import Heads, PagedLayer
from tokenspeed.kernels.triton.work_items import StepRows, make_items

L2_BYTES = 50e6


@dataclass(frozen=True)
class PagedStep:
    """Rows of (tokens before the step, tokens fed), row i in slot i; every layer of the arena is alike."""

    rows: tuple[tuple[int, int], ...]
    kv: torch.Tensor
    table: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor

    def layer(self, index: int) -> PagedLayer:
        """One layer's pages, by an index that wraps around."""
        return PagedLayer(self.kv[:, index % self.kv.shape[1]], self.table, self.positions, self.slots)

    def items(self, per_item: int, decode_rows: bool = False) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Work items, and the list of rows that feed one token where those are to be apart."""
        starts = torch.tensor([0, *(fed for _, fed in self.rows)]).cumsum(0)[:-1]
        fields = [list(range(len(self.rows))), starts.tolist(), [f for _, f in self.rows], [b for b, _ in self.rows]]
        columns = torch.tensor(fields, dtype=torch.int32, device=self.kv.device)
        table = StepRows(columns[0], columns[1], columns[2], columns[3], columns.new_tensor([len(self.rows)]))
        items = columns.new_empty(max_items(len(self.positions), len(self.rows), per_item), 4)
        alone = columns.new_empty(len(self.rows)) if decode_rows else None
        make_items(table, len(self.positions), per_item, items, alone)
        return items, alone

    def answer(self, q: torch.Tensor, heads: Heads) -> torch.Tensor:
        """Attention of layer 0 in float32 by torch, one sequence after the other."""
        out, start = [], 0
        for slot, (before, fed) in enumerate(self.rows):
            pages = self.table[slot, : -(-(before + fed) // self.kv.shape[3])].long()
            entries = self.kv[pages, 0].transpose(0, 1).flatten(1, 2)[:, : before + fed].float().transpose(1, 2)
            at = self.positions[start : start + fed, None]
            n = torch.arange(before + fed, device=at.device)
            mask = (n <= at) & (n > at - heads.window) if heads.window else n <= at
            queries = q[start : start + fed].float().view(fed, heads.heads, -1).transpose(0, 1)
            attended = F.scaled_dot_product_attention(
                queries[None], entries[0][None], entries[1][None], mask, scale=heads.scale, enable_gqa=True
            )
            out.append(attended[0].transpose(0, 1).reshape(fed, -1))
            start += fed
        return torch.cat(out)


def paged_step(
    rows: Sequence[tuple[int, int]],
    heads: Heads,
    page_size: int,
    dtype: torch.dtype = torch.bfloat16,
    layers: int | None = None,
    device: str = "cuda",
) -> PagedStep:
    """Pages in random order. layers: as many as exceed L2 four times where not given. Unused entries are NaN."""
    pages = [-(-(before + fed) // page_size) for before, fed in rows]
    token_bytes = 2 * heads.kv_heads * heads.head_dim * dtype.itemsize
    if layers is None:
        layers = max(2, min(32, int(4 * L2_BYTES / (sum(pages) * page_size * token_bytes)) + 1))
    kv = torch.full(
        (sum(pages), layers, 2, page_size, heads.kv_heads, heads.head_dim), torch.nan, dtype=dtype, device=device
    )
    table = torch.full((len(rows), max(pages)), -1, dtype=torch.int32)
    free = torch.randperm(sum(pages)).to(torch.int32).split(pages)
    for slot, (mine, (before, fed)) in enumerate(zip(free, rows, strict=True)):
        table[slot, : len(mine)] = mine
        for number, page in enumerate(mine.tolist()):
            kept = min(page_size, before + fed - number * page_size)
            kv[page, :, :, :kept] = torch.randn(kv[page, :, :, :kept].shape, device=device).to(dtype)
    positions = torch.cat([torch.arange(before, before + fed) for before, fed in rows]).to(torch.int32)
    slots = torch.cat([torch.full((fed,), i) for i, (_, fed) in enumerate(rows)]).to(torch.int32)
    return PagedStep(tuple(rows), kv, table.to(device), positions.to(device), slots.to(device))
