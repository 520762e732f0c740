"""Asks for memory ahead of its use: what is constant, or may change and is only read later. For NVIDIA GPUs."""

from __future__ import annotations

import triton
import triton.language as tl

LINE = tl.constexpr(128)
"""Bytes of a cache line."""


@triton.jit
def prefetch_rows(rows: tl.tensor, first: tl.tensor, ITEM: tl.constexpr, COLUMNS: tl.constexpr) -> None:
    """Ask for COLUMNS elements of ITEM bytes from `first` on, behind each pointer of `rows`, to be brought into the
    second-level cache. COLUMNS * ITEM: a power of two, of a line or more."""
    lines = tl.arange(0, COLUMNS * ITEM // LINE) * (LINE // ITEM)
    pointers = rows[:, None] + first + lines[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
        "=r,l",
        [pointers.to(tl.int64)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
