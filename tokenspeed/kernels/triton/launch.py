"""Programmatic dependent launch: a kernel starts while the one before it drains, and waits for it inside.

Every program of a kernel launched so must wait, also one that has nothing to do: the next kernel takes this one's end
as a sign that all before it has ended.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch


@lru_cache
def _capable(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def dependent_launch(x: torch.Tensor) -> bool:
    """Whether kernels over `x` [tokens, ...] are launched dependently: on NVIDIA from Hopper on, for small steps."""
    return x.is_cuda and x.shape[0] <= 64 and _capable(x.device)


def launch_options(pdl: bool, **options: Any) -> dict[str, Any]:
    """Keyword arguments of a launch; AMD's compiler does not know `launch_pdl`."""
    return {**options, "launch_pdl": True} if pdl else options
