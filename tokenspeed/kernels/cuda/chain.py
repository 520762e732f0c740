"""Projections of one row that follow each other, in one kernel (`chain.cu`)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch

from tokenspeed.kernels.cuda.program import Kernel, architecture, compiled
from tokenspeed.kernels.cuda.stream import ACTS, processors
from tokenspeed.kernels.triton.operands import Matrix, Norm
from tokenspeed.quantization.fp8 import Fp8Weight

WARPS = 16
SHARED = 227 << 10
"""Bytes of a program: all that a processor has for one."""
UNIT_BYTES = 4096
"""Of a stage of a ring: rows of a unit times bytes of each."""
SEGMENTS = (512, 256)
SITES = 256
LISTS = ("columns", "acts", "joins")


@dataclass(frozen=True)
class Link:
    """A projection y = f(x) W^T. norm: x is the residual, to which what the link before gave is added [after
    branch_norm], normed; without it x is what the link before gave."""

    weight: Matrix
    act: str = "none"
    norm: Norm | None = None
    branch_norm: Norm | None = None


@dataclass(frozen=True)
class ChainVariant:
    """What a kernel is compiled for: names of the definitions of `chain.cu`, in lower case."""

    columns: tuple[int, ...]
    acts: tuple[int, ...]
    joins: tuple[int, ...]
    item: int
    branch_norm: int
    segment: int
    stages: int
    warps: int = WARPS

    @property
    def unit(self) -> int:
        """Rows of W."""
        return UNIT_BYTES // self.segment

    @property
    def shared(self) -> int:
        """Bytes of `chain.cu`'s Shared."""
        stage = UNIT_BYTES + 64 + 8
        return self.warps * (self.stages * stage + 4 * (2 * self.unit + 3)) + 2 * max(self.columns)

    def defines(self) -> dict[str, int | str]:
        """For the compiler."""
        lists = {name.upper(): ",".join(map(str, getattr(self, name))) for name in LISTS}
        numbers = {name: getattr(self, name) for name in ("item", "branch_norm", "segment", "stages", "warps")}
        return {name.upper(): value for name, value in numbers.items()} | lists | {
            "OPS": len(self.columns), "SHARED": self.shared,
        }  # fmt: skip


def variant(links: Sequence[Link]) -> ChainVariant | None:
    """The variant for these, None where they do not fit its tiles."""
    matrices = [link.weight.q if isinstance(link.weight, Fp8Weight) else link.weight for link in links]
    item = matrices[0].element_size()
    slices = [matrix.shape[1] * item // WARPS for matrix in matrices]
    segment = next((segment for segment in SEGMENTS if segment <= min(slices)), None)
    if segment is None or any(matrix.shape[1] * item % (WARPS * 64) for matrix in matrices):
        return None
    found = ChainVariant(
        tuple(matrix.shape[1] for matrix in matrices),
        tuple(ACTS[link.act] for link in links),
        tuple(int(link.norm is not None) for link in links),
        item,
        int(any(link.branch_norm is not None for link in links)),
        segment,
        0,
    )
    stages = (SHARED - found.shared) // (WARPS * (UNIT_BYTES + 72))
    return None if stages < 2 else replace(found, stages=stages)


class Operand(ctypes.Structure):
    """`chain.cu`'s."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("branch", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("w_scale", ctypes.c_void_p),
        ("norm", ctypes.c_void_p),
        ("branch_norm", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("joined", ctypes.c_void_p),
        ("w_stride", ctypes.c_longlong),
        ("n", ctypes.c_int),
        ("eps", ctypes.c_float),
        ("branch_eps", ctypes.c_float),
    )


@cache
def argument_type(links: int) -> type[ctypes.Structure]:
    """`chain.cu`'s Chain of so many."""
    fields = [("op", Operand * links), ("site", ctypes.c_int)]
    return type("Chain", (ctypes.Structure,), {"_fields_": fields})


@cache
def kernel(found: ChainVariant, device: int) -> Kernel:
    """Compiled and loaded."""
    return Kernel(compiled("chain", found.defines(), architecture(device)), "chain", 32 * WARPS, found.shared)


def chain(x: torch.Tensor, residual: torch.Tensor, links: Sequence[Link]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """What the last of `links` gives, [1, N], and the residual after the last join, [1, K]; None where no variant takes
    them. x: input of the first link, [1, K] bf16, contiguous, as is the residual.

    All programs of the kernel wait for each other, so no other one of this kind may run on the device meanwhile.
    """
    found = variant(links)
    if found is None or links[0].norm is not None:
        return None
    argument = argument_type(len(links))()
    for operand, link in zip(argument.op, links, strict=True):
        x, residual = _fill(operand, link, x, residual)
    argument.site = _sites.setdefault(argument.op[0].weight, len(_sites) % SITES)
    device = torch.cuda.current_device() if x.device.index is None else x.device.index
    kernel(found, device).launch_struct((processors(device), 1, 1), argument)
    return x, residual


_sites: dict[int, int] = {}
"""Where launches count their programs, by the first weight: launches at the same time are of different models."""


def _fill(
    operand: Operand, link: Link, before: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Describe a link: its output, and the residual after it, whose memory the caller keeps."""
    weight = link.weight
    matrix, scale = (weight.q, weight.scale) if isinstance(weight, Fp8Weight) else (weight, None)
    operand.weight, operand.w_stride = matrix.data_ptr(), matrix.stride(0) * matrix.element_size()
    operand.w_scale = None if scale is None else scale.data_ptr()
    operand.n = matrix.shape[0] if link.act == "none" else matrix.shape[0] // 2
    y = torch.empty(1, operand.n, dtype=before.dtype, device=before.device)
    operand.x, operand.y = before.data_ptr(), y.data_ptr()
    if link.norm is not None:
        joined = torch.empty_like(residual)
        operand.x, operand.branch, operand.joined = residual.data_ptr(), before.data_ptr(), joined.data_ptr()
        operand.norm, operand.eps = link.norm.weight.data_ptr(), link.norm.eps
        residual = joined
    if link.branch_norm is not None:
        operand.branch_norm, operand.branch_eps = link.branch_norm.weight.data_ptr(), link.branch_norm.eps
    return y, residual
