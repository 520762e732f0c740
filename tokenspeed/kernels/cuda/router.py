"""Norm, router and choice of experts of a few tokens in one kernel (`router.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import asdict, dataclass
from functools import cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled, pointer
from tokenspeed.kernels.cuda.stream import aligned
from tokenspeed.kernels.triton.launch import device_index
from tokenspeed.kernels.triton.operands import Prologue
from tokenspeed.kernels.triton.route import Noise
from tokenspeed.kernels.triton.router import Routed
from tokenspeed.ops.definitions import Attrs

MOST_TOKENS = 32
"""At 64 it is as fast as kernels apart."""
WARPS, MOST_PROGRAMS = 8, 8
"""Of a program; of a cluster."""
MOST_HELD, MOST_REGISTERS = 32, 200
"""16 bytes of weights that a thread holds in registers; of these and of rows."""
PROGRAMS = 64
"""Of all clusters, if they can have several tokens each: those of a kernel in front leave processors to so many, whose
weights are there when it ends."""
MOST_CHOSEN = 32
SCORES = {"softmax": 0, "sigmoid": 1, "logits": 2}


@dataclass(frozen=True)
class Variant:
    """What a kernel is compiled for: names of the definitions of `router.cu`, in lower case."""

    cols: int
    experts: int
    k: int
    programs: int
    warps: int
    tokens: int
    score: int
    renormalize: int
    branch: int
    branch_norm: int
    bias: int
    correction: int
    noise: int

    @property
    def shared(self) -> int:
        """Bytes of `router.cu`'s Shared."""
        return -(-(self.tokens * (2 * self.cols + 4 * self.experts) + 8 * self.warps) // 16) * 16

    def defines(self) -> dict[str, int]:
        """For the compiler."""
        return {name.upper(): value for name, value in asdict(self).items()} | {"SHARED": self.shared}


def variant(
    cols: int,
    experts: int,
    attrs: Attrs,
    prologue: Prologue,
    bias: bool,
    correction: bool,
    noise: bool,
    tokens: int = 1,
) -> Variant | None:
    """The variant for rows of so many columns and experts; None where nothing `fits`. tokens: of a cluster."""
    branch, branch_norm = prologue.branch is not None, prologue.branch_norm is not None
    given = (int(each) for each in (attrs["renormalize"], branch, branch_norm, bias, correction, noise))
    found = Variant(cols, experts, attrs["k"], programs_of(experts), WARPS, tokens, SCORES[attrs["score"]], *given)
    return found if fits(cols, experts, attrs, tokens) else None


def fits(cols: int, experts: int, attrs: Attrs, tokens: int = 1) -> bool:
    """Whether there is a variant: not for groups of experts, nor where the weights of a warp's experts, and its part of
    so many tokens of a cluster, are more than its registers hold."""
    suiting = cols % 8 == 0 and attrs["groups"] == 1 and attrs["k"] <= MOST_CHOSEN and tokens <= WARPS
    each = -(-experts // (programs_of(experts) * WARPS))
    held, rows = each * -(-cols // 256), 2 * -(-cols * tokens // (8 * 32 * WARPS))
    return suiting and held <= MOST_HELD and 4 * held + 8 * rows <= MOST_REGISTERS and each * tokens <= 32


def programs_of(experts: int) -> int:
    """Of a cluster."""
    return min(MOST_PROGRAMS, 1 << (-(-experts // WARPS) - 1).bit_length())


def tokens_of(tokens: int, experts: int) -> int:
    """Of a cluster, so that there are PROGRAMS at most."""
    return 1 << (-(-tokens * programs_of(experts) // PROGRAMS) - 1).bit_length()


@cache
def kernel(found: Variant, device: int) -> Kernel:
    """Compiled and loaded."""
    cubin = compiled("router", found.defines(), architecture(device))
    return Kernel(cubin, "route", 32 * found.warps, found.shared, found.programs)


def route_rows(
    x: torch.Tensor,
    prologue: Prologue,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    attrs: Attrs,
    slots: torch.Tensor,
    noise: Noise | None = None,
) -> Routed | None:
    """`triton.router.route_rows` of rows of bf16; None where no variant takes them. Weights, slots and positions are
    read before the wait of dependent launch: kernels in front must not write them."""
    (tokens, hidden), experts, k = x.shape, weight.shape[0], attrs["k"]
    branch, branch_norm = prologue.branch, prologue.branch_norm
    wanted = tokens_of(tokens, experts)
    together = wanted if fits(hidden, experts, attrs, wanted) else 1
    given = (bias is not None, correction is not None, noise is not None)
    found = variant(hidden, experts, attrs, prologue, *given, together)
    if found is None or x.dtype != torch.bfloat16 or not aligned(x, branch, weight):
        return None
    ids = torch.empty(tokens, k, dtype=torch.int32, device=x.device)
    shares = torch.empty(tokens, k, dtype=torch.float32, device=x.device)
    normed = torch.empty(tokens, hidden, dtype=x.dtype, device=x.device)
    joined = None if branch is None else torch.empty_like(normed)
    tensors = (x, branch, weight, bias, correction, prologue.norm.weight, branch_norm.weight if branch_norm else None)
    pointers = (*tensors, slots, noise.positions if noise else None, ids, shares, normed, joined)
    strides = (x.stride(0), 0 if branch is None else branch.stride(0), weight.stride(0))
    factors = (prologue.norm.eps, branch_norm.eps if branch_norm else 0.0, attrs["scale"])
    kernel(found, device_index(x.device)).launch(
        (found.programs, -(-tokens // together), 1),
        [
            *(pointer(each) for each in pointers),
            *((stride, ctypes.c_longlong) for stride in strides),
            *((factor, ctypes.c_float) for factor in factors),
            (noise.seed if noise else 0, ctypes.c_uint),
            (tokens, ctypes.c_int),
        ],
    )
    return Routed(ids, shares, normed, joined)
