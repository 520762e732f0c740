"""Projections of 9 to 64 rows of bf16 or e4m3 by weights alike, by Hopper's products: `dense_tall.cu`."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer
from tokenspeed.kernels.cuda.stream import aligned
from tokenspeed.kernels.cuda.tensor_maps import TensorMap, encoded
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.kernels.triton.operands import Matrix, Rows, matrix_parts, scale_block_of
from tokenspeed.quantization.fp8 import Fp8Weight
from tokenspeed.quantization.narrow import PackedWeight

FEWEST_TOKENS, MOST_TOKENS = 9, 64
TILE, LINE = 128, 128
"""Rows of W of a tile, bytes of a row in a copy."""
THREADS = 2 * 128 + 32
MOST_SHARED = 227 << 10
CLUSTERS = {4: 30, 3: 39, 2: 66, 1: 132}
"""How many of so many programs run at once on an H200 (cuOccupancyMaxActiveClusters)."""
MOST_TILES = 48
"""More tiles are no better than Triton's kernel, nor is bf16 of more than FEW_TILES at up to 32 rows, nor of long rows
at more. us a layer of projections, before and with this kernel: 8B in bf16 at 32 rows 125.3 and 119.4 (with down by
Triton 123.8; o 120.8; with q, k, v by this kernel 121.5; gate and up 122.6), at 64 132.0 and 127.2 (down by this kernel
128.6; q, k, v by Triton 131.2), in e4m3 at 32 74.4 and 72.0, at 64 83.7 and 77.4; 1B at 32 in bf16 46.6 and 42.2, in
e4m3 32.9 and 30.2. At 128 rows nothing is won."""
FEW_TILES, LONG_ROW = 32, 8192
FEW_TOKENS, SMALL_WEIGHT = 16, 16 << 20
"""So few take weights of e4m3 of no more bytes: the step in fp8 at 9 / 12 / 16 sequences is 4.83 / 5.57 / 6.42 ms for
5.09 / 5.83 / 6.64 of Qwen3-30B-A3B, 0.728 / 0.769 / 0.798 for 0.776 / 0.796 / 0.834 of 1B, 2.914 / 2.944 / 3.077 for
2.902 / 2.972 / 3.080 of 8B. Larger ones lose (8B 2.958 / 2.990 / 3.084), and so does bf16 (8B 4.47 / 4.54 / 4.65 for
4.35 / 4.42 / 4.53)."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `dense_tall.cu`, in lower case."""

    tokens: int
    k: int
    n: int
    format: int
    splits: int
    stages: int

    @property
    def tiles(self) -> int:
        """Of all rows of W."""
        return -(-self.n // TILE)

    @property
    def stage(self) -> int:
        """Bytes of a stage, with its barriers."""
        return (TILE + self.tokens) * LINE + 16

    @property
    def shared(self) -> int:
        """Bytes of the source's Shared."""
        held = -(-self.tokens // 8 // self.splits) if self.splits > 1 else 1
        return self.stages * self.stage + held * self.splits * 256 * 16 + 16 + 4 * self.tokens

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(tokens: int, n: int, k: int, narrow: bool, splits: int = 0) -> Variant | None:
    """The variant for [n, k] weights, None where they do not fit its tiles or another kernel is better. splits: as many
    as find room, unless given."""
    tiles, segments = -(-n // TILE), k * (1 if narrow else 2) // LINE
    wide = not narrow and (tiles > FEW_TILES if tokens <= 32 else k > LONG_ROW)
    large = tokens <= FEW_TOKENS and (not narrow or n * k > SMALL_WEIGHT)
    if not FEWEST_TOKENS <= tokens <= MOST_TOKENS or tiles > MOST_TILES or n % 2 or wide or large:
        return None
    if k * (1 if narrow else 2) % LINE:
        return None
    splits = splits or next(each for each, room in CLUSTERS.items() if tiles <= room)
    found = Variant(32 if tokens <= 32 else 64, k, n, int(narrow), splits, 0)
    stages = min((MOST_SHARED - found.shared) // found.stage, -(-segments // splits))
    return replace(found, stages=stages) if splits <= segments else None


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled("dense_tall", found.defines(), architecture(device))
    return Kernel(cubin, "dense_tall", THREADS, found.shared, found.splits)


def tall_rows(
    x: Rows, weight: Matrix, bias: torch.Tensor | None = None, act: str = "none", found: Variant | None = None
) -> torch.Tensor | None:
    """`triton.linear.skinny` of bf16 without activation; None for what no variant takes. found: the variant, if it is
    chosen already."""
    if isinstance(weight, PackedWeight) or act != "none" or scale_block_of(weight):
        return None
    matrix, scale = matrix_parts(weight)
    rows, (n, k) = x.values.shape[0], matrix.shape
    found = found or variant(rows, n, k, isinstance(weight, Fp8Weight))
    if found is None or x.values.dtype != matrix.dtype or not aligned(x.values, matrix):
        return None
    device = device_index(matrix.device)
    y = torch.empty(rows, n, dtype=torch.bfloat16, device=matrix.device)
    kernel(found, device).launch(
        (found.tiles * found.splits, 1, 1),
        [
            (tensor_map(matrix.data_ptr(), matrix.dtype, (n, k), matrix.stride(0), TILE), None),
            (tensor_map(x.values.data_ptr(), x.values.dtype, (rows, k), x.values.stride(0), found.tokens), None),
            pointer(y),
            pointer(scale),
            pointer(x.scale),
            pointer(bias),
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
