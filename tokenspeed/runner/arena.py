"""The bytes of the KV cache. Page ids come from `cache`; only this file knows where a page lies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokenspeed.ops.kv import entry_columns
from tokenspeed.runner.arena_memory import ArenaMemory, HostMemory, TorchMemory
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


class Arena:
    """One tensor [pages, layers per group, 2, page_size, kv_heads, entry]; index 2 is key, value; see `ops.kv`."""

    def __init__(
        self, num_pages: int, shape: PageShape, device: torch.device, memory: ArenaMemory | None = None
    ) -> None:
        """memory: at least the bytes of all pages, on `device`; by default the host's or torch's own."""
        nbytes = num_pages * shape.page_bytes
        if memory is None:
            memory = HostMemory(nbytes) if device.type == "cpu" else TorchMemory(nbytes, device, "torch holds it")
        # Left uninitialised: untouched pages cost no memory, and no position is read before it is written.
        size = (num_pages, shape.layout.layers_per_group, 2, shape.page_size, shape.kv_heads, shape.entry_columns)
        self._memory = memory
        self.kv = memory.data[:nbytes].view(shape.dtype).view(size)
        self.shape = shape

    def sleep(self) -> None:
        """Give back the memory of all pages, and what they hold. Raises what `ArenaMemory.sleep` does."""
        self._memory.sleep()

    def wake(self) -> None:
        """Take memory for all pages again, at the same addresses. Raises what `ArenaMemory.wake` does."""
        self._memory.wake()

    def close(self) -> None:
        """Give the memory back for good: `kv` must not be touched again."""
        self._memory.close()

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Copy pages, given as (from, to)."""
        sources, targets = (list(side) for side in zip(*pairs, strict=True))
        stored = self.kv.view(torch.uint8)
        stored[targets] = stored[sources]
