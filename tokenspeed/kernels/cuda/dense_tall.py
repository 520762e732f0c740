"""Projections of 9 to 128 rows of bf16 or e4m3 by weights alike, by Hopper's products: `dense_tall.cu`."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer, processors
from tokenspeed.kernels.cuda.stream_tiles import ACTS
from tokenspeed.kernels.cuda.tensor_maps import TensorMap, encoded
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.kernels.triton.operands import Multiplied, Rows, matrix_parts, scale_block_of

TALL = 64
"""Rows of W in a product."""
LINE = 128
"""Bytes of a row in a copy."""
GROUPS = 2
ALL_SHARED = 227 << 10
LEAST_STAGES = 3
LEAST_LINES = 2
MOST_SPLITS = 16


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `dense_tall.cu`, in lower case."""

    tokens: int
    k: int
    n: int
    format: int
    groups: int
    blocks: int
    splits: int
    pair: int
    stages: int
    programs: int
    act: int

    @property
    def threads(self) -> int:
        return self.groups * 128 + 32

    @property
    def outputs(self) -> int:
        """Of a tile."""
        return self.groups * TALL * (1 if self.act else self.blocks)

    @property
    def tiles(self) -> int:
        return -(-self.n // self.outputs)

    @property
    def stage(self) -> int:
        """Bytes."""
        return (self.groups * self.blocks * TALL + self.tokens) * LINE + 16

    @property
    def shared(self) -> int:
        return self.stages * self.stage + 4 * self.tokens

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(
    tokens: int,
    n: int,
    k: int,
    narrow: bool,
    act: str,
    room: int,
    blocks: int = 2,
    programs: int = 1,
    splits: int | None = None,
    pair: int = 1,
) -> Variant | None:
    """n: outputs, after the activation. room: processors."""
    lines, rest = divmod(k * (1 if narrow else 2), LINE)
    if rest or n % 2 or act not in ACTS or (act != "none" and blocks != 2):
        return None
    padded = max(16, 1 << (tokens - 1).bit_length())
    found = Variant(padded, k, n, int(narrow), GROUPS, blocks, 1, pair, 0, programs, ACTS[act])
    stages = min(16, (ALL_SHARED // programs - 1024 - 4 * padded) // found.stage)
    tiles = -(-found.tiles // pair) * pair
    splits = splits or max(1, min(room * programs // tiles, lines // LEAST_LINES, MOST_SPLITS, padded // 8))
    if stages < LEAST_STAGES:
        return None
    return replace(found, stages=stages, splits=splits)


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled("dense_tall", found.defines(), architecture(device))
    return Kernel(cubin, "dense_tall", found.threads, found.shared, found.pair)


@cache
def meeting_place(device: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where programs that share a tile leave sums, and their counters, zero between kernels."""
    where = torch.device("cuda", device)
    return torch.empty(160 * 2 * 128 * 256, device=where), torch.zeros(4096, dtype=torch.int32, device=where)


def multiply_rows(
    x: Rows, weight: Multiplied, bias: torch.Tensor | None, act: str, found: Variant | None = None
) -> torch.Tensor | None:
    """`triton.linear.skinny` of bf16, None where no variant takes it."""
    rows, cols = x.values.shape
    matrix, scale = matrix_parts(weight)
    n = matrix.shape[0] if act == "none" else matrix.shape[0] // 2
    device = device_index(matrix.device)
    found = found or variant(rows, n, cols, matrix.element_size() == 1, act, processors(device))
    if found is None or scale_block_of(weight):
        return None
    y = torch.empty(rows, n, dtype=torch.bfloat16, device=matrix.device)
    parts, met = meeting_place(device)
    sharing = found.splits * found.pair
    grid = min(-(-found.tiles // found.pair), found.programs * processors(device) // sharing) * sharing
    kernel(found, device).launch(
        (grid, 1, 1),
        [
            (tensor_map(matrix.data_ptr(), matrix.dtype, tuple(matrix.shape), matrix.stride(0), TALL), None),
            (tensor_map(x.values.data_ptr(), x.values.dtype, (rows, cols), x.values.stride(0), found.tokens // found.pair), None),
            pointer(y),
            pointer(scale),
            pointer(x.scale),
            pointer(bias),
            pointer(parts),
            pointer(met),
            (y.stride(0), ctypes.c_longlong),
            (rows, ctypes.c_int),
        ],
    )
    return y


@lru_cache(maxsize=8192)
def tensor_map(address: int, dtype: torch.dtype, shape: tuple[int, int], stride: int, rows: int) -> TensorMap:
    """Of a matrix at this address: boxes of 128 bytes of so many rows, swizzled."""
    count, cols = shape
    line = stride * dtype.itemsize
    return encoded(
        f"a matrix {list(shape)} of {dtype}",
        address,
        dtype,
        (cols, count, 1, 1, 1),
        (line, line * count, line * count, line * count),
        (LINE // dtype.itemsize, rows, 1, 1, 1),
        swizzled=True,
    )
