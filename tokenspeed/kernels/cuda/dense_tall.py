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
from tokenspeed.kernels.triton.linear import add_parts
from tokenspeed.kernels.triton.operands import Multiplied, Rows, matrix_parts, scale_block_of

TALL = 64
"""Rows of W in a product."""
LINE = 128
"""Bytes of a row in a copy."""
GROUPS = 2
THREADS = GROUPS * 128 + 32
ALL_SHARED = 227 << 10
LEAST_STAGES = 3


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `dense_tall.cu`, in lower case."""

    tokens: int
    k: int
    n: int
    format: int
    shared_rows: int
    blocks: int
    splits: int
    pair: int
    stages: int
    act: int

    @property
    def tiles(self) -> int:
        heights = 1 if self.shared_rows else GROUPS
        return -(-self.n // (heights * TALL * (1 if self.act else self.blocks)))

    @property
    def stage(self) -> int:
        """Bytes of a stage, with its barriers."""
        lines = GROUPS if self.shared_rows else 1
        return (GROUPS * self.blocks * TALL + lines * self.tokens) * LINE + 16

    @property
    def shared(self) -> int:
        """Bytes of the source's Shared."""
        other = 4 * self.blocks * self.tokens // 2 * 128 if self.shared_rows else 8
        return self.stages * self.stage + other + 4 * self.tokens

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(
    tokens: int,
    rows: int,
    k: int,
    narrow: bool,
    act: str,
    *,
    shared_rows: bool = False,
    blocks: int = 1,
    splits: int = 1,
    pair: int = 1,
) -> Variant | None:
    """The variant for weights of so many rows, None where they do not fit its tiles. What several programs leave is
    activated when it is added up."""
    gated = act != "none" and splits == 1
    segments, rest = divmod(k * (1 if narrow else 2), LINE * (GROUPS if shared_rows else 1))
    n = rows // 2 if gated else rows
    if rest or segments < splits or n % 2 or act not in ACTS or (gated and blocks != 2):
        return None
    padded = max(16, 1 << (tokens - 1).bit_length())
    found = Variant(
        padded, k, n, int(narrow), int(shared_rows), blocks, splits, pair, 0, ACTS[act] if gated else ACTS["none"]
    )
    return replace(found, stages=stages) if (stages := (ALL_SHARED - found.shared) // found.stage) >= LEAST_STAGES else None


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled("dense_tall", found.defines(), architecture(device))
    return Kernel(cubin, "dense_tall", THREADS, found.shared, found.pair)


def multiply_rows(
    x: Rows, weight: Multiplied, bias: torch.Tensor | None, act: str, found: Variant
) -> torch.Tensor | None:
    """`triton.linear.skinny` of bf16."""
    rows, cols = x.values.shape
    matrix, scale = matrix_parts(weight)
    device = device_index(matrix.device)
    if scale_block_of(weight):
        return None
    n = matrix.shape[0] if act == "none" else matrix.shape[0] // 2
    y = torch.empty(rows, n, dtype=torch.bfloat16, device=matrix.device)
    parts = None
    if found.splits > 1:
        parts = torch.empty(found.splits, rows, matrix.shape[0], dtype=torch.float32, device=matrix.device)
    sharing = found.splits * found.pair
    grid = min(-(-found.tiles // found.pair), processors(device) // sharing) * sharing
    kernel(found, device).launch(
        (grid, 1, 1),
        [
            (tensor_map(matrix.data_ptr(), matrix.dtype, tuple(matrix.shape), matrix.stride(0), TALL), None),
            (
                tensor_map(
                    x.values.data_ptr(),
                    x.values.dtype,
                    (rows, cols),
                    x.values.stride(0),
                    found.tokens // found.pair,
                ),
                None,
            ),
            pointer(y),
            pointer(parts),
            pointer(scale),
            pointer(x.scale),
            pointer(bias),
            (y.stride(0), ctypes.c_longlong),
            (rows, ctypes.c_int),
        ],
    )
    if parts is not None:
        add_parts(parts, x.scale, scale, bias, y, act)
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
