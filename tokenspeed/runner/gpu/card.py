"""A GPU as a place for memory: how much there is, and where the pages of the KV cache come from."""

from __future__ import annotations

import logging
from typing import Protocol

import torch

from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.runner.arena_memory import ArenaMemory, TorchMemory
from tokenspeed.runner.gpu.driver import Driver, load_driver
from tokenspeed.runner.gpu.memory import DeviceMemory, VirtualRange, tensor_of

logger = logging.getLogger("tokenspeed")


class Card(Protocol):
    """One GPU, or a stand-in for tests."""

    def memory(self) -> tuple[int, int]:
        """Bytes free, and in all."""
        ...

    def settle(self) -> None:
        """Wait for all work, then give back what torch keeps for later."""
        ...

    def pages(self, nbytes: int) -> ArenaMemory:
        """Memory for KV pages. Raises MemoryLimitError and DeviceError."""
        ...


class CudaCard:
    """A device of torch's. Without virtual memory, which is said once, pages are torch's own and cannot sleep."""

    def __init__(self, device: torch.device) -> None:
        index = torch.cuda.current_device() if device.index is None else device.index
        self._device = torch.device("cuda", index)
        torch.cuda.synchronize(self._device)  # the driver's calls need a current context
        self._driver: Driver | None = None
        self._why_awake = ""
        try:
            self._driver = load_driver(index)
        except UnsupportedError as error:
            self._why_awake = str(error)
            logger.warning("the KV cache cannot sleep: %s", error)

    def memory(self) -> tuple[int, int]:
        return torch.cuda.mem_get_info(self._device)

    def settle(self) -> None:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()

    def tensor(self, owner: VirtualRange, nbytes: int) -> torch.Tensor:
        """uint8 [nbytes] over the start of a range."""
        return tensor_of(owner, nbytes, self._device)

    def pages(self, nbytes: int) -> ArenaMemory:
        if self._driver is None:
            return TorchMemory(nbytes, self._device, self._why_awake)
        self.settle()
        return DeviceMemory(self._driver, self, nbytes)


def has_e4m3(device: torch.device) -> bool:
    """Whether a CUDA device converts e4m3, as fp8 pages need."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 9)


def open_card(device: torch.device) -> Card | None:
    """The card of a CUDA device; None for the CPU."""
    return CudaCard(device) if device.type == "cuda" else None
