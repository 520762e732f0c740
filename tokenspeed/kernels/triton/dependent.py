"""How kernels are launched: compile options, and programmatic dependent launch where the device has it.

A kernel launched so may start before the one in front of it has ended. It must call `gdc_wait` before it reads what an
earlier kernel wrote and before it writes anything; what it reads before the wait may only be constant (weights).
"""

from __future__ import annotations

from functools import cache

import torch


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def dependent_launch(device: torch.device) -> bool:
    """Whether kernels on this device can be launched ahead: NVIDIA GPUs from Hopper on."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    return _capability(index) >= (9, 0)


def options(warps: int, pdl: bool, stages: int = 1) -> dict[str, int | bool]:
    """Keyword arguments of a launch, the kernel's own PDL constant among them."""
    common: dict[str, int | bool] = {"num_warps": warps, "num_stages": stages, "PDL": pdl}
    return common | {"launch_pdl": True} if pdl else common
