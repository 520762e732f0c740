"""The chosen experts of some tokens of bf16 by weights of bf16 or e4m3, by Hopper's products: `experts_tall.cu`."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer, processors
from tokenspeed.kernels.cuda.stream_tiles import ACTS, BITS, FORMATS
from tokenspeed.kernels.cuda.tensor_maps import TensorMap, encoded
from tokenspeed.kernels.triton.expert_operands import ExpertMatrix, Experts
from tokenspeed.kernels.triton.expert_sums import combine
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.quantization.fp8 import Fp8Weight

MOST_TOKENS = 128
FEW_TOKENS = 32
"""Of which experts seldom have more choices than a small block."""
ROWS = (8, 16)
"""Choices of a block, of few tokens and of more. Of an expert with more choices the weights are read again."""
TALL = 64
"""Rows of W in a unit."""
LINE = 128
"""Bytes of a row of W in a copy."""
THREADS = 160
UP_PROGRAMS, DOWN_PROGRAMS = 2, 3
"""Of a processor. Qwen3-30B-A3B's experts of fp8 at 1 / 4 / 8 / 32 / 128 tokens: 16.0 / 38.7 / 63.2 / 128.8 / 155.8 us
(by Triton, or streamed, 17.6 / 58.5 / 74.7 / 142.9 / 172.7); by two for down 16.0 / 39.2 / 64.4 / 130.6 / 155.4."""
BF16_TOKENS = range(2, 9)
"""Taken in bf16: 41.4 / 69.9 / 117.7 us at 2 / 4 / 8 tokens, streamed or by Triton 42.9 / 74.3 / 118.2; 24.5 for 22.5
us at one, 246.5 for 243.8 at 32."""
EARLY_TOKENS = frozenset({1, *range(3, 9)})
"""Of which the projection after the experts may start, and ask for weights, before their sum does: Qwen3-30B-A3B's step
in fp8 at 1 / 2 / 3 / 6 / 8 / 12 / 32 sequences 1.670 / 2.323 / 2.745 / 3.906 / 4.548 / 5.905 / 8.603 ms, 1.686 /
2.265 / 2.793 / 3.961 / 4.598 / 5.865 / 8.495 where it starts later."""
ALL_SHARED = 227 << 10
LEAST_STAGES = 3


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `experts_tall.cu`, in lower case."""

    rows: int
    experts: int
    chosen: int
    choices: int
    k: int
    n: int
    format: int
    step: int
    stages: int
    programs: int
    act: int

    @property
    def down(self) -> bool:
        return self.act == 0

    @property
    def shared(self) -> int:
        """Bytes that the source's Shared takes at most."""
        x = self.k * BITS[self.format] // 8 * self.rows
        blocks = min(self.chosen, self.experts + self.chosen // self.rows)
        lists = (
            4 * -(-self.chosen // 32) * 32
            + 2 * blocks * (1 + self.rows)
            + 4 * (self.rows + -(-self.experts // 32) * 32 + 1)
            + 8
        )
        return self.stages * (self.step * TALL * LINE + 16) + x + -(-lists // 16) * 16

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(
    tokens: int,
    experts: int,
    choices: int,
    columns: int,
    outputs: int,
    format: int,
    act: str,
    programs: int | None = None,
    step: int | None = None,
    rows: int | None = None,
) -> Variant | None:
    """The variant for weights of so many columns in a format of FORMATS, None where they do not fit its tiles. act:
    "none" for down; outputs: after the activation."""
    lines, rest = divmod(columns * BITS[format] // 8, LINE)
    if act not in ACTS or tokens > MOST_TOKENS or rest or outputs % (TALL if act == "none" else TALL // 2):
        return None
    chosen = choices << (tokens - 1).bit_length()
    rows = rows or ROWS[tokens > FEW_TOKENS]
    programs = programs or (DOWN_PROGRAMS if act == "none" else UP_PROGRAMS)
    step = step or (2 if tokens <= 2 and lines % 2 == 0 else 1)
    found = Variant(rows, experts, chosen, choices, columns, outputs, format, step, 0, programs, ACTS[act])
    stages = (ALL_SHARED // programs - 1024 - found.shared) // (step * TALL * LINE + 16)
    return replace(found, stages=stages) if stages >= LEAST_STAGES else None


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled("experts_tall", found.defines(), architecture(device))
    return Kernel(cubin, "experts_tall", THREADS, found.shared)


def multiply_experts(
    x: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    given: Experts,
    first: Variant | None = None,
    second: Variant | None = None,
) -> torch.Tensor | None:
    """`triton.experts.run_experts` of up to MOST_TOKENS tokens, None where no variant takes them: [T, hidden] bf16.
    first, second: variants of gate and up, and of down. By e4m3 weights rows are rounded to e4m3, each by its scale."""
    (tokens, hidden), k = x.shape, ids.shape[1]
    if given.gate_up_bias is not None or not _taken(given.gate_up) or not _taken(given.down):
        return None
    ff, format = given.down.shape[2], FORMATS[type(given.down)]
    first = first or variant(tokens, given.number, k, hidden, ff, format, given.act)
    second = second or variant(tokens, given.number, k, ff, hidden, format, "none")
    if first is None or second is None or x.stride(1) != 1 or (x.stride(0) * 2) % 16 or x.data_ptr() % 16:
        return None
    between = torch.empty(tokens * k, ff, dtype=torch.bfloat16, device=x.device)
    parts = torch.empty(tokens * k, hidden, dtype=torch.float32, device=x.device)
    _launch(first, x, ids, given.gate_up, between, parts)
    _launch(second, between, ids, given.down, between, parts)
    return combine(parts, ids, shares, x.dtype, True, early=tokens in EARLY_TOKENS)


def _launch(
    found: Variant, x: torch.Tensor, ids: torch.Tensor, weight: ExpertMatrix, y: torch.Tensor, parts: torch.Tensor
) -> None:
    matrix, scale = (weight.q, weight.scale) if isinstance(weight, Fp8Weight) else (weight, None)
    assert isinstance(matrix, torch.Tensor)
    device = device_index(x.device)
    kernel(found, device).launch(
        (found.programs * processors(device), 1, 1),
        [
            (tensor_map(matrix.data_ptr(), matrix.dtype, tuple(matrix.shape), found.down), None),
            pointer(x),
            pointer(ids),
            pointer(scale),
            pointer(y),
            pointer(parts),
            (x.stride(0), ctypes.c_longlong),
            (ids.numel(), ctypes.c_int),
        ],
    )


@lru_cache(maxsize=4096)
def tensor_map(address: int, dtype: torch.dtype, shape: tuple[int, ...], down: bool) -> TensorMap:
    """Of weights [experts, rows, cols] at this address: boxes of 128 bytes of a unit's rows, by four times eight and
    the eight that belong to them, their lines swizzled. Coordinates: column, row, half, eight rows, expert."""
    experts, rows, cols = shape
    line = cols * dtype.itemsize
    apart, eights = (8, rows // 16) if down else (rows // 2, rows // 16)
    return encoded(
        f"experts {list(shape)} of {dtype}",
        address,
        dtype,
        (cols, 8, 2, eights, experts),
        (line, apart * line, (16 if down else 8) * line, rows * line),
        (LINE // dtype.itemsize, 8, 2, 4, 1),
        swizzled=True,
    )


def _taken(weight: ExpertMatrix) -> bool:
    """Whether it is bf16, or e4m3 with a scale per row, contiguous."""
    if isinstance(weight, Fp8Weight):
        return not weight.scale_block and weight.q.is_contiguous() and weight.scale.is_contiguous()
    return isinstance(weight, torch.Tensor) and weight.dtype == torch.bfloat16 and weight.is_contiguous()
