"""How kernels are launched: compile options, and programmatic dependent launch where the device has it.

A kernel launched so may start before the one in front of it has ended. It must call `gdc_wait` before it reads what an
earlier kernel wrote and before it writes anything; what it reads before the wait may only be constant (weights), or
older than the kernel in front. Every program must wait, also one that has nothing to do: the next kernel takes this
one's end as a sign that all before it has ended.

Older than the kernel in front: a kernel here lets the next one start only behind its own wait (or by its end), so when
any program of kernel n runs, all programs of n - 1 have waited, and n - 2 with all before it has ended and is visible.
The streaming projection (`kernels/cuda/stream.cu`) lets the next one start at once: a run of such kernels counts as one
with the kernel before it. In a decode step the inputs of the step are written by the first kernels, and an embedding
and a projection come between them and any layer's attention; keys of earlier positions were written by earlier steps.
So attention reads positions, slots, block tables and older keys before it waits for its queries.
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


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on this device can be launched ahead: NVIDIA GPUs from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _capability(index) >= (9, 0)


@cache
def _processors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 0 for other devices."""
    if device.type != "cuda":
        return 0
    return _processors(torch.cuda.current_device() if device.index is None else device.index)


def small_step(x: torch.Tensor) -> bool:
    """Whether kernels over `x` [tokens, ...] are launched ahead: where the device can, for small steps."""
    return x.shape[0] <= MOST_TOKENS and dependent_launch(x.device)


def launch_options(pdl: bool, **options: Any) -> dict[str, Any]:
    """Keyword arguments of a launch; AMD's compiler does not know `launch_pdl`."""
    return {**options, "launch_pdl": True} if pdl else options


def options(warps: int, pdl: bool, stages: int = 1) -> dict[str, Any]:
    """The same, with the kernel's own PDL constant among them."""
    return launch_options(pdl, num_warps=warps, num_stages=stages, PDL=pdl)
