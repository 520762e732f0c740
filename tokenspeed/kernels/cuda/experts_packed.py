"""The chosen experts of some tokens of bf16 by MXFP4 weights, streamed: `experts_packed.cu`."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer, processors
from tokenspeed.kernels.cuda.stream_tiles import ACTS
from tokenspeed.kernels.cuda.tensor_maps import TensorMap, encoded
from tokenspeed.kernels.triton.expert_operands import Experts
from tokenspeed.kernels.triton.expert_sums import combine
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.quantization.mxfp4_experts import Mxfp4Experts
from tokenspeed.quantization.nibbles import RUN

MOST_TOKENS = 128
ROWS = {1: (1,), 2: (2,), 4: (4,), 32: (8,), 64: (16,), 128: (24, 16)}
"""Choices of a block, the better first, by the most tokens. Of an expert with more the weights are read again."""
TALL = 16
"""Rows of W in a unit."""
RUN_BYTES = 64
"""Of a row of W."""
ACTIVATIONS = ACTS | {"swiglu_clamped": 3}
ALL_SHARED = 227 << 10
"""Bytes of shared memory of all programs of a processor."""
EARLY_TOKENS = range(1, 9)
"""Of which the projection after the experts may start, and ask for weights, before their sum does: gpt-oss-20b's step
at 1 / 8 / 32 sequences 1.359 / 3.161 / 4.780 ms, 1.414 / 3.209 / 4.762 where it starts later."""


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `experts_packed.cu`, in lower case."""

    rows: int
    experts: int
    chosen: int
    choices: int
    k: int
    n: int
    warps: int
    team: int
    talls: int
    programs: int
    buffers: int
    step: int
    stages: int
    act: int
    bias: int

    @property
    def down(self) -> bool:
        return self.act == 0

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def stage(self) -> int:
        """Bytes of a warp's stage, with its barrier."""
        return self.talls * self.step * TALL * (RUN_BYTES + 4) + 8

    @property
    def shared(self) -> int:
        """Bytes of the source's Shared."""
        x = self.buffers * self.rows * (-(-self.k // (RUN * self.step)) * self.step * 2 * RUN + 64)
        blocks = min(self.chosen, self.experts + self.chosen // self.rows)
        lists = 4 * (_warps(self.experts) + _warps(self.chosen) + 1) + 2 * blocks * (1 + self.rows)
        shared = self.warps if self.team > 1 else 1
        powers, sums = (
            self.warps * self.talls * self.step * TALL * 16,
            2 * shared * self.talls * 512 * -(-self.rows // 8),
        )
        return -(-(self.warps * self.stages * self.stage + powers + sums + x + lists) // 16) * 16

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


@dataclass(frozen=True)
class Way:
    """warps of a program, how many share a unit, programs of a processor, runs of 128 columns in a stage, how many
    times TALL rows a unit has, buffers for x."""

    warps: int
    team: int
    programs: int
    step: int
    talls: int = 1
    buffers: int = 1


_MANY = (Way(12, 2, 1, 4), Way(8, 2, 1, 2))
WAYS = {
    1: (Way(5, 1, 3, 4), Way(8, 2, 1, 2)),
    2: (Way(8, 2, 2, 4), Way(8, 2, 1, 2)),
    4: _MANY,
    8: _MANY,
    16: (Way(12, 2, 1, 2), Way(8, 1, 1, 2)),
    24: (Way(8, 1, 1, 1, 2), Way(12, 1, 1, 2), Way(8, 1, 1, 2)),
}
"""By rows, the better first. gpt-oss-20b's experts of 1 / 2 / 4 / 8 / 32 tokens: 25.3 / 41.2 / 61.5 / 88.3 / 134 us, by
Triton 34.0 / 49.0 / 102.6 / 128.9 / 178; by teams of one warp from 2 tokens on 3 to 6 us more."""
LEAST_STAGES = 2


def variant(
    tokens: int, experts: int, choices: int, columns: int, outputs: int, act: str, bias: bool, way: Way | None = None
) -> Variant | None:
    """The variant for weights of so many columns, None where they do not fit its tiles. act: "none" for down; outputs:
    after the activation."""
    unit = TALL if act == "none" else TALL // 2
    if act not in ACTIVATIONS or tokens > MOST_TOKENS or columns % 8 or outputs % unit:
        return None
    chosen, flags = choices << (tokens - 1).bit_length(), (ACTIVATIONS[act], int(bias))
    for rows, taken in _candidates(tokens, way):
        shape = (rows, experts, chosen, choices, columns, outputs)
        found = Variant(
            *shape, taken.warps, taken.team, taken.talls, taken.programs, taken.buffers, taken.step, 0, *flags
        )
        stages = (ALL_SHARED // taken.programs - 1024 - found.shared) // (taken.warps * found.stage)
        if stages >= LEAST_STAGES and outputs % (unit * taken.talls) == 0:
            return replace(found, stages=stages)
    return None


def _candidates(tokens: int, way: Way | None) -> Iterator[tuple[int, Way]]:
    for rows in next(each for most, each in ROWS.items() if tokens <= most):
        yield from ((rows, each) for each in ((way,) if way else WAYS[rows]))


def _warps(count: int) -> int:
    """The next multiple of a warp's threads."""
    return -(-count // 32) * 32


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled("experts_packed", found.defines(), architecture(device))
    return Kernel(cubin, "experts_packed", found.threads, found.shared)


def stream_packed(
    x: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    given: Experts,
    first: Variant | None = None,
    second: Variant | None = None,
) -> torch.Tensor | None:
    """`triton.experts.run_experts` of up to MOST_TOKENS tokens, None where no variant takes them: [T, hidden] bf16.
    first, second: variants of gate and up, and of down."""
    (tokens, hidden), k = x.shape, ids.shape[1]
    gate_up, down = given.gate_up, given.down
    if not isinstance(gate_up, Mxfp4Experts) or not isinstance(down, Mxfp4Experts) or x.dtype != torch.bfloat16:
        return None
    ff = down.cols
    first = first or variant(tokens, given.number, k, hidden, ff, given.act, given.gate_up_bias is not None)
    second = second or variant(tokens, given.number, k, ff, hidden, "none", given.down_bias is not None)
    if first is None or second is None or x.stride(1) != 1 or (x.stride(0) * 2) % 16 or x.data_ptr() % 16:
        return None
    between = torch.empty(tokens * k, ff, dtype=torch.bfloat16, device=x.device)
    parts = torch.empty(tokens * k, hidden, dtype=torch.float32, device=x.device)
    _launch(first, x, ids, gate_up, given.gate_up_bias, between, parts, given)
    _launch(second, between, ids, down, given.down_bias, between, parts, given)
    return combine(parts, ids, shares, x.dtype, True, early=tokens in EARLY_TOKENS)


def _launch(
    found: Variant,
    x: torch.Tensor,
    ids: torch.Tensor,
    weight: Mxfp4Experts,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    parts: torch.Tensor,
    given: Experts,
) -> None:
    device = device_index(x.device)
    codes, scales = tensor_maps(
        weight.q.data_ptr(), weight.scale.data_ptr(), *weight.shape, found.down, found.step, found.talls
    )
    kernel(found, device).launch(
        (found.programs * processors(device), 1, 1),
        [
            (codes, None),
            (scales, None),
            pointer(x),
            pointer(ids),
            pointer(bias),
            pointer(y),
            pointer(parts),
            (x.stride(0), ctypes.c_longlong),
            (ids.numel(), ctypes.c_int),
            (given.alpha, ctypes.c_float),
            (given.limit, ctypes.c_float),
        ],
    )


@lru_cache(maxsize=4096)
def tensor_maps(
    codes: int, scales: int, experts: int, rows: int, cols: int, down: bool, step: int, talls: int
) -> tuple[TensorMap, TensorMap]:
    """Of the words and of the exponents of Mxfp4Experts [experts, rows, cols] at these addresses: boxes of `step` runs
    of eight rows and the eight that belong to them, `talls` times. Coordinates of words: word, row, half, run, sixteen
    of all experts; of exponents: row, half, run, sixteen of the expert, expert."""
    runs, unit = -(-cols // RUN), TALL if down else TALL // 2
    line, apart = runs * RUN_BYTES, TALL // 2 if down else rows // 2
    what = f"experts [{experts}, {rows}, {cols}] of mxfp4"
    return (
        encoded(
            what, codes, torch.int16, (RUN_BYTES // 2, 8, 2, runs, experts * rows // unit),
            (line, apart * line, RUN_BYTES, unit * line), (RUN_BYTES // 2, 8, 2, step, talls),
        ),
        encoded(
            what, scales, torch.int32, (8, 2, runs, rows // TALL, experts),
            (4 * apart, 4 * rows, 4 * unit, 4 * runs * rows), (8, 2, step, talls, 1),
        ),
    )  # fmt: skip
