"""The bytes of the KV cache. Page ids come from `cache`; only this file knows where a page lies."""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from tokenspeed.ops.kv import entry_columns
from tokenspeed.runner.layout import PageLayout


@dataclass(frozen=True)
class PageShape:
    """What one page holds: keys and values of `page_size` tokens for the layers of one group."""

    layout: PageLayout
    page_size: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    @property
    def entry_columns(self) -> int:
        """Elements of one key or value of one head: head_dim, and those that a scale takes."""
        return entry_columns(self.dtype, self.head_dim)

    @property
    def element_bytes(self) -> float:
        """Bytes of each element of a key or value, its part of a scale included."""
        return self.entry_columns * self.dtype.itemsize / self.head_dim

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        entries = self.layout.layers_per_group * 2 * self.page_size * self.kv_heads
        return entries * self.entry_columns * self.dtype.itemsize


def _reserve(size: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory that costs nothing until touched. On a CPU in pages of 2 MiB where the system has them: attention reads
    all over it, and looking up addresses would hold up its prefetch."""
    if device.type != "cpu" or sys.platform != "linux":
        return torch.empty(size, dtype=dtype, device=device)
    block = mmap.mmap(-1, math.prod(size) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without such pages
        block.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(block, dtype=torch.uint8).view(dtype).view(size)


class Arena:
    """One tensor [pages, layers per group, 2, page_size, kv_heads, entry]; index 2 is key, value; see `ops.kv`."""

    def __init__(self, num_pages: int, shape: PageShape, device: torch.device) -> None:
        # Not initialised: no position is read before it is written.
        size = (num_pages, shape.layout.layers_per_group, 2, shape.page_size, shape.kv_heads, shape.entry_columns)
        self.kv = _reserve(size, shape.dtype, device)
        self.shape = shape

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages, given as (from, to)."""
        sources, targets = (list(side) for side in zip(*pairs, strict=True))
        stored = self.kv.view(torch.uint8)
        stored[targets] = stored[sources]
