"""The CUDA kernels as implementations. Each has a Triton twin, which takes what they do not."""

from __future__ import annotations

from functools import cache, partial

import torch

from tokenspeed.kernels.cuda.program import compiler_found
from tokenspeed.kernels.cuda.stream import stream
from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.kernels.triton import dense
from tokenspeed.kernels.triton.linear import project
from tokenspeed.kernels.triton.operands import Matrix, Prologue
from tokenspeed.ops.definitions import Operands

PRIORITY = 20


def register(registry: Registry) -> None:
    """Add the projections of one row of bf16."""
    run = partial(dense.run_projection, project=stream_or_project)
    for op in ("linear", *dense.FUSED):
        registry.add(Implementation(f"cuda.{op}", op, "cuda", run, _takes, PRIORITY))


def stream_or_project(
    x: torch.Tensor, weight: Matrix, bias: torch.Tensor | None, act: str, prologue: Prologue | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By the streaming kernel where its tiles fit, else as `triton.linear.project`."""
    return stream(x, weight, bias, act, prologue) or project(x, weight, bias, act, prologue)


def _takes(operands: Operands, situation: Situation) -> bool:
    return situation.device == "cuda" and situation.dtype == "bfloat16" and situation.tokens == 1 and usable()


@cache
def usable() -> bool:
    """Whether the device has bulk copies and dependent launch (Hopper and later), and the compiler is there."""
    if not torch.cuda.is_available() or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability() >= (9, 0) and compiler_found()
