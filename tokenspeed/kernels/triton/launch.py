"""How kernels are launched: compile options, and programmatic dependent launch where the device has it.

A kernel launched so may start before the one in front of it has ended. It must call `gdc_wait` before it reads what an
earlier kernel wrote and before it writes anything; what it reads before the wait may only be constant (weights), or
older than every kernel that can still run: inputs of a step, once a kernel between has let others start only after its
own wait (`embed`, `rope_write`), and keys of earlier steps. Every program must wait, also one that has nothing to do:
the next kernel takes this one's end as a sign that all before it has ended.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch

MOST_TOKENS = 64
"""Attention and its writes are launched ahead up to so many tokens: beyond, there is work enough to hide the gap."""


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def device_index(device: torch.device) -> int:
    """Of a CUDA device: that of the current one where it names none."""
    return torch.cuda.current_device() if device.index is None else device.index


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on this device can be launched ahead: NVIDIA GPUs from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return _capability(device_index(device)) >= (9, 0)


def small(tokens: int, device: torch.device) -> bool:
    """Whether kernels of a step of so many tokens are launched ahead: where the device can, for small ones."""
    return tokens <= MOST_TOKENS and dependent_launch(device)


def small_step(x: torch.Tensor) -> bool:
    """The same of kernels over `x` [tokens, ...]."""
    return small(x.shape[0], x.device)


def launch_options(pdl: bool, **options: Any) -> dict[str, Any]:
    """Keyword arguments of a launch; AMD's compiler does not know `launch_pdl`."""
    return {**options, "launch_pdl": True} if pdl else options


def options(warps: int, pdl: bool, stages: int = 1) -> dict[str, Any]:
    """The same, with the kernel's own PDL constant among them."""
    return launch_options(pdl, num_warps=warps, num_stages=stages, PDL=pdl)


def exact_options(warps: int, pdl: bool) -> dict[str, Any]:
    """The same of kernels whose multiply and add are never contracted, whatever the compiler makes of a shape."""
    return options(warps, pdl) | {"enable_fp_fusion": False}
