"""Attention of prompts over their pages by Hopper's warpgroup products (`prefill.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from functools import cache, lru_cache
from math import gcd

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer, processors
from tokenspeed.kernels.cuda.tensor_maps import TensorMap, encoded
from tokenspeed.kernels.triton.attention_tiles import pad
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.kernels.triton.paged import LOG2E, Heads, PagedLayer

ROWS, KEYS = 128, 128
"""Of a tile: query tokens times query heads of one key head; keys of a block."""
THREADS = 384
"""Two warpgroups that multiply, and one of which a warp loads."""
SLOTS = 6
"""Blocks of keys or of values that a program may have under way: with heads of 128, all that shared memory holds."""
HEAD_DIMS = (64, 128)
MOST_GROUP = 64
"""What the kernel takes."""
COLUMNS = 64
"""Of a copy: 128 bytes."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `prefill.cu`, in lower case."""

    dim: int
    group: int
    group_pad: int
    page: int
    box: int

    @property
    def shared(self) -> int:
        """Bytes of `prefill.cu`'s Shared."""
        return 2 * self.dim * (SLOTS * KEYS + ROWS) + 16 * SLOTS + 8

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(heads: Heads, page: int) -> Variant:
    """The variant for such heads and pages."""
    return Variant(heads.head_dim, heads.group, pad(heads.group), page, gcd(page, KEYS))


def fits(heads: Heads) -> bool:
    """Whether the kernel takes such an attention."""
    plain = not heads.window and not heads.softcap and heads.scale > 0
    return plain and heads.head_dim in HEAD_DIMS and heads.group <= MOST_GROUP


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled("prefill", found.defines(), architecture(device))
    return Kernel(cubin, "prefill", THREADS, found.shared)


@lru_cache(maxsize=1024)
def tensor_map(address: int, shape: tuple[int, ...], strides: tuple[int, ...], box: int) -> TensorMap:
    """For pages of bf16 [pages, 2, page_size, kv_heads, head_dim] (strides in elements): copies of `box` entries of one
    head and 64 columns, their lines of 128 bytes swizzled. Coordinates go from the last axis to the first: column,
    entry, head, which, page; beyond the last page are zeros. Raises DeviceError."""
    pages, two, page, kv_heads, dim = shape
    return encoded(
        f"pages {list(shape)} with strides {list(strides)}",
        address,
        torch.bfloat16,
        (dim, page, kv_heads, two, pages),
        [2 * strides[axis] for axis in (2, 3, 1, 0)],
        (COLUMNS, box, 1, 1, 1),
        swizzled=True,
    )


def takes_pages(q: torch.Tensor, kv: torch.Tensor) -> bool:
    """Whether the kernel takes these queries and pages: bf16, pages of a multiple of 16 tokens, and rows at multiples
    of 16 bytes."""
    if q.dtype != torch.bfloat16 or kv.dtype != torch.bfloat16 or kv.shape[2] % 16 or kv.stride(-1) != 1:
        return False
    apart = (q.stride(0), *kv.stride()[:4])
    return all(stride % 8 == 0 for stride in apart) and q.data_ptr() % 16 == 0 and kv.data_ptr() % 16 == 0


def prefill(q: torch.Tensor, paged: PagedLayer, items: torch.Tensor, heads: Heads) -> torch.Tensor | None:
    """`prefill_attention` without window, soft cap and sinks; None for pages that it does not take.

    q [T, heads * head_dim], bf16, rows may have gaps. items: int32 [n, 4] as `prefill_attention` takes them, at most
    ROWS / padded group tokens each. Returns [T, heads * head_dim]; rows in no item are not written.
    """
    if not takes_pages(q, paged.kv):
        return None
    out = torch.empty((q.shape[0], heads.heads * heads.head_dim), dtype=q.dtype, device=q.device)
    device = device_index(q.device)
    kv, found = paged.kv, variant(heads, paged.kv.shape[2])
    programs = min(processors(device), items.shape[0] * heads.kv_heads)
    kernel(found, device).launch(
        (programs, 1, 1),
        [
            (tensor_map(kv.data_ptr(), tuple(kv.shape), kv.stride(), found.box), None),
            pointer(q),
            pointer(paged.table),
            pointer(items),
            pointer(out),
            (q.stride(0), ctypes.c_longlong),
            (paged.table.stride(0), ctypes.c_longlong),
            (items.shape[0], ctypes.c_int),
            (heads.kv_heads, ctypes.c_int),
            (kv.shape[0], ctypes.c_int),
            (heads.scale * LOG2E.value, ctypes.c_float),
        ],
    )
    return out
