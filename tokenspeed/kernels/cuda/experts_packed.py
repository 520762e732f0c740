"""The chosen experts of some tokens of bf16 by MXFP4 weights, streamed: `experts_packed.cu`."""

from __future__ import annotations

import ctypes
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

MOST_TOKENS = 64
ROWS = {1: 1, 2: 2, 4: 4, MOST_TOKENS: 8}
"""Choices of a block, by the most tokens. Of an expert with more the weights are read again."""
TALL = 16
"""Rows of W in a unit."""
RUN_BYTES = 64
"""Of a row of W."""
ACTIVATIONS = ACTS | {"swiglu_clamped": 3}
ALL_SHARED = 227 << 10
"""Bytes of shared memory of all programs of a processor."""
EARLY_TOKENS = range(2, 9)
"""Of which the projection after the experts may start, and ask for weights, before their sum does: gpt-oss-20b's step
at 8 / 16 / 32 sequences 3.055 / 4.128 / 4.467 ms, 3.123 / 4.129 / 4.470 where it starts later."""


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
    def sums(self) -> bool:
        """Whether it weighs and adds up what the experts of its one token give."""
        return self.down and self.chosen == self.choices

    @property
    def threads(self) -> int:
        return 32 * self.warps

    @property
    def stage(self) -> int:
        """Bytes of a warp's stage, with its barrier."""
        return self.step * TALL * (RUN_BYTES + 4) + 8

    @property
    def shared(self) -> int:
        """Bytes of the source's Shared."""
        rows = self.choices if self.sums else self.rows
        x = self.buffers * rows * (-(-self.k // (RUN * self.step)) * self.step * 2 * RUN + 64)
        blocks = min(self.chosen, self.experts + self.chosen // self.rows)
        lists = 4 * (_warps(self.experts) + _warps(self.chosen) + 1) + 2 * blocks * (1 + self.rows)
        shared = self.warps if self.team > 1 else 1
        powers, sums = self.warps * self.step * TALL * 16, 2 * shared * 512
        return -(-(self.warps * self.stages * self.stage + powers + sums + x + lists) // 16) * 16

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


@dataclass(frozen=True)
class Way:
    """warps of a program, how many share a unit, programs of a processor, runs of 128 columns in a stage, buffers for
    x."""

    warps: int
    team: int
    programs: int
    step: int
    buffers: int = 1


_SMALL = Way(8, 2, 1, 2)
WAYS = {
    1: (Way(5, 1, 3, 4), _SMALL),
    2: (Way(8, 2, 2, 4), _SMALL),
    4: (Way(12, 3, 1, 4, 2), _SMALL),
    8: (Way(12, 2, 1, 4, 2), Way(12, 2, 1, 4), _SMALL),
}
"""By rows, the better first. gpt-oss-20b's experts of 1 / 2 / 4 / 8 / 16 / 32 / 64 tokens: 23.1 / 37.5 / 57.5 / 82.2 /
108 / 119.5 / 157 us, by Triton 33.4 / 48 / 88 / 128 / 163 / 177 / 174 (183 of 128, where this takes 238); with one
buffer for x 60.0 of 4 tokens, 83.5 of 8."""
LEAST_STAGES, MOST_WARPS = 2, 16


def ways(rows: int, down: bool, choices: int) -> tuple[Way, ...]:
    """For blocks of so many rows, the better first. Down of one token has as many warps for each of its choices, which
    saves the kernel that adds up: gpt-oss-20b's step 1.300 ms for 1.328; by teams of 4 1.302, of 16 warps 1.327."""
    if rows > 1 or not down:
        return WAYS[rows]
    team = choices * max(1, 8 // choices)
    return (Way(team, team, 2, 4), Way(team, team, 1, 2)) if team <= MOST_WARPS else ()


def variant(
    tokens: int, experts: int, choices: int, columns: int, outputs: int, act: str, bias: bool, way: Way | None = None
) -> Variant | None:
    """The variant for weights of so many columns, None where they do not fit its tiles. act: "none" for down; outputs:
    after the activation."""
    unit = TALL if act == "none" else TALL // 2
    if act not in ACTIVATIONS or tokens > MOST_TOKENS or columns % 8 or outputs % unit:
        return None
    rows = next(each for most, each in ROWS.items() if tokens <= most)
    shape = rows, experts, choices << (tokens - 1).bit_length(), choices, columns, outputs
    for each in (way,) if way else ways(rows, act == "none", choices):
        flags = ACTIVATIONS[act], int(bias)
        found = Variant(*shape, each.warps, each.team, each.programs, each.buffers, each.step, 0, *flags)
        stages = (ALL_SHARED // each.programs - 1024 - found.shared) // (each.warps * found.stage)
        if stages >= LEAST_STAGES:
            return replace(found, stages=stages)
    return None


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
    _launch(first, x, ids, shares, gate_up, given.gate_up_bias, between, None, given)
    if second.sums:
        y = torch.empty(1, hidden, dtype=x.dtype, device=x.device)
        _launch(second, between, ids, shares, down, given.down_bias, y, None, given)
        return y
    parts = torch.empty(tokens * k, hidden, dtype=torch.float32, device=x.device)
    _launch(second, between, ids, shares, down, given.down_bias, None, parts, given)
    return combine(parts, ids, shares, x.dtype, True, early=tokens in EARLY_TOKENS)


def _launch(
    found: Variant,
    x: torch.Tensor,
    ids: torch.Tensor,
    shares: torch.Tensor,
    weight: Mxfp4Experts,
    bias: torch.Tensor | None,
    y: torch.Tensor | None,
    parts: torch.Tensor | None,
    given: Experts,
) -> None:
    device = device_index(x.device)
    codes, scales = tensor_maps(weight.q.data_ptr(), weight.scale.data_ptr(), *weight.shape, found.down, found.step)
    kernel(found, device).launch(
        (found.programs * processors(device), 1, 1),
        [
            (codes, None),
            (scales, None),
            pointer(x),
            pointer(ids),
            pointer(shares),
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
    codes: int, scales: int, experts: int, rows: int, cols: int, down: bool, step: int
) -> tuple[TensorMap, TensorMap]:
    """Of the words and of the exponents of Mxfp4Experts [experts, rows, cols] at these addresses: boxes of `step` runs
    of eight rows and the eight that belong to them. Coordinates of words: word, row, half, run, sixteen
    of all experts; of exponents: row, half, run, sixteen of the expert, expert."""
    runs, unit = -(-cols // RUN), TALL if down else TALL // 2
    line, apart = runs * RUN_BYTES, TALL // 2 if down else rows // 2
    what = f"experts [{experts}, {rows}, {cols}] of mxfp4"
    return (
        encoded(
            what, codes, torch.int16, (RUN_BYTES // 2, 8, 2, runs, experts * rows // unit),
            (line, apart * line, RUN_BYTES, unit * line), (RUN_BYTES // 2, 8, 2, step, 1),
        ),
        encoded(
            what, scales, torch.int32, (8, 2, runs, rows // TALL, experts),
            (4 * apart, 4 * rows, 4 * unit, 4 * runs * rows), (8, 2, step, 1, 1),
        ),
    )  # fmt: skip
