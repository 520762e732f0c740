"""Rotation, KV write and attention of a few decoding tokens in one kernel (`attend.cu`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer, processors
from tokenspeed.kernels.cuda.stream_tiles import PROGRAMS_PER_SM
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.kernels.triton.paged import LOG2E, Heads, PagedLayer
from tokenspeed.kernels.triton.rope_write import HeadNorm, device_frequencies
from tokenspeed.kernels.triton.view import Reach
from tokenspeed.ops.rope import Rope

WARPS, KEYS = 4, 16
"""Of a program, twice as many where eight share keys of heads of 64 (1B, one sequence: 4.3 for 4.7 us; heads of 128
take 5.7 for 4.6); of a warp's tile."""
SPLITS = {16: 8, 32: 4, 128: 2, 1 << 30: 1}
NARROW_SPLITS = {16: 8, 64: 4, 128: 2, 1 << 30: 1}
"""Programs that share the keys of one item (a token and key head), by the most items; of heads of 64 (1B, 8
sequences: 9.9 for 10.9 us). 8B, 1100 tokens of context, 1 / 2 / 4 / 8 / 16 / 32 / 64 / 128 sequences: 5.5 / 8.2 / 9.5 /
13.4 / 20.7 / 39.4 / 76.3 / 144 us with rotation and write, where the three Triton kernels take 10.3 / 13.9 / 15.0 /
19.2 / 29.0 / 46.3 / 83.8 / 153. With 16, at one sequence, every processor has a program, and the projections behind it
take longer."""
MOST_TOKENS = 256
RING, NARROW_RING, LITTLE_RING = 96 << 10, 64 << 10, 32 << 10
MANY_ITEMS = 512
"""Bytes of keys and values that a program may have under way; of heads of 64, unless two share an item; the same of
more items than these, of which more programs then find room at once. us of 32 and 128 sequences by 96 / 64 / 32 KiB:
1B 25.9 / 24.7 / 24.3 and 80.9 / 78.2 / 77.2, gpt-oss-20b 24.5 / 24.0 / 25.3 and 83.8 / 80.4 / 78.1, its windowed
layers 8.0 / 8.3 / 9.2 and 29.9 / 25.7 / 20.6; heads of 128 lose by less than 64."""
HEAD_DIMS, MOST_GROUP, FEWEST_KEY_HEADS = (64, 128), 8, 4
"""What the kernel takes; with fewer key heads its programs are too few for the memory."""
FAR = 4096
"""Tokens before a sequence's, beyond which programs are no longer in clusters but as many as run at once. 8B, one
sequence of 4,096 / 8,192 / 32,768 tokens: 9.7 / 13.2 / 35.7 us, clusters of 8 take 9.7 / 15.9 / 51.3, three Triton
kernels 14.7 / 19.2 / 43.3."""
MOST_PARTS = 32
"""Programs of an item then."""
FAR_ROWS = 8
"""More have programs enough."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `attend.cu`, in lower case."""

    dim: int
    group: int
    half: int
    page: int
    splits: int
    warps: int
    stages: int
    normed: int
    sinks: int

    @property
    def shared(self) -> int:
        """Bytes of `attend.cu`'s Shared."""
        tile = 2 * KEYS * 2 * self.dim
        ring = self.warps * max(self.stages * tile, 4 * self.group * self.dim)
        turned = 8 * 2 * (self.dim + 32) + 2 * 4 * self.half + 2 * 4 * (self.dim if self.normed else 1)
        merged = 4 * self.group * (2 * self.warps + 2 * max(self.splits, 1) + self.dim) + 4
        return ring + tile + turned + merged

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(splits: int, heads: Heads, rope: Rope, page: int, normed: bool, sinks: bool, items: int = 1) -> Variant:
    """The variant of clusters of so many programs, 0 for programs without, for such heads and pages."""
    dim = heads.head_dim
    narrow = dim == 64 and splits not in (0, 2)
    ring = RING if not narrow else NARROW_RING if items <= MANY_ITEMS else LITTLE_RING
    warps = 2 * WARPS if narrow and splits == 8 else WARPS
    stages = ring // (warps * 2 * KEYS * 2 * dim)
    return Variant(dim, heads.group, rope.dim // 2, page, splits, warps, stages, int(normed), int(sinks))


def fits(heads: int, kv_heads: int, head_dim: int) -> bool:
    """Whether the kernel takes an attention of this shape."""
    return head_dim in HEAD_DIMS and heads <= MOST_GROUP * kv_heads and kv_heads >= FEWEST_KEY_HEADS


def reach_of(lengths: Sequence[int]) -> Reach:
    """Of sequences of so many tokens. The kernel's splits do not follow their lengths, so it takes none that are long
    among the others."""
    longest, rows = max(lengths, default=0), len(lengths)
    if longest * rows > 512 * rows + 2 * sum(lengths):
        return Reach.UNEVEN
    return Reach.FAR if longest > FAR and rows <= FAR_ROWS else Reach.NEAR


@cache
def _counters(device: torch.device, address: int, items: int) -> torch.Tensor:
    """Of programs that have ended, of the attention over the pages that are there: no two of those run at once."""
    return torch.zeros(items, dtype=torch.int32, device=device)


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled("attend", found.defines(), architecture(device))
    return Kernel(cubin, "attend", 32 * found.warps, found.shared, max(found.splits, 1))


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    paged: PagedLayer,
    rope: Rope,
    heads: Heads,
    norms: tuple[HeadNorm, HeadNorm] | None = None,
    sinks: torch.Tensor | None = None,
    far: bool = False,
) -> torch.Tensor | None:
    """`rope_write` and `decode_attention` of tokens of different sequences; None for pages that it does not take.

    far: whether sequences are long for clusters: see `reach_of`.

    q [T, heads * head_dim], k and v [T, kv_heads * head_dim], bf16, rows may have gaps. Positions, slots, block tables
    and the keys of earlier tokens are read before the wait of dependent launch: kernels in front must not write them.
    """
    tokens, page = q.shape[0], paged.kv.shape[2]
    if paged.kv.dtype != torch.bfloat16 or page % KEYS:
        return None
    out = torch.empty((tokens, heads.heads * heads.head_dim), dtype=q.dtype, device=q.device)
    device, items = device_index(q.device), tokens * heads.kv_heads
    by_items = NARROW_SPLITS if heads.head_dim == 64 else SPLITS
    splits = 0 if far else next(splits for most, splits in by_items.items() if items <= most)
    found = variant(splits, heads, rope, page, norms is not None, sinks is not None, items)
    programs, parts = splits, None
    if far:
        # Even, so that what the kernel reads four at a time begins at 16 bytes.
        programs = min(MOST_PARTS, max(2, PROGRAMS_PER_SM * processors(device) // items // 2 * 2))
        parts = torch.empty((items, programs, heads.group, heads.head_dim + 2), dtype=torch.float32, device=q.device)
    strides = (q.stride(0), k.stride(0), v.stride(0), paged.table.stride(0), *paged.kv.stride()[:4])
    q_norm, k_norm = norms or (None, None)
    kernel(found, device).launch(
        (programs, heads.kv_heads, tokens),
        [
            pointer(q),
            pointer(k),
            pointer(v),
            pointer(q_norm.weight if q_norm else None),
            pointer(k_norm.weight if k_norm else None),
            pointer(device_frequencies(rope, q.device)),
            pointer(paged.positions),
            pointer(paged.slots),
            pointer(paged.table),
            pointer(paged.kv),
            pointer(out),
            pointer(sinks),
            pointer(parts),
            pointer(_counters(q.device, paged.kv.data_ptr(), items) if far else None),
            *((stride, ctypes.c_longlong) for stride in strides),
            (heads.window, ctypes.c_int),
            (heads.scale * LOG2E.value, ctypes.c_float),
            (rope.scale, ctypes.c_float),
            (q_norm.eps if q_norm else 0.0, ctypes.c_float),
            (k_norm.eps if k_norm else 0.0, ctypes.c_float),
        ],
    )
    return out
