"""What CUDA offers beyond tensors: graphs, pinned memory and events; and the kernels around the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tokenspeed.runner.gpu import steps
from tokenspeed.runner.gpu.graphs import CudaDevice


class CudaLink:
    """The current CUDA device and stream."""

    def __init__(self) -> None:
        self.recorder = CudaDevice()

    def pinned(self, size: int) -> torch.Tensor:
        """Page-locked int32 [size]."""
        return torch.zeros(size, dtype=torch.int32).pin_memory()

    def mark(self) -> Callable[[], None]:
        """An event after all work given so far."""
        event = torch.cuda.Event()
        event.record()
        return event.synchronize


def gpu_steps() -> Any:
    """The kernels before and after the forward pass."""
    module: ModuleType = steps
    return module
