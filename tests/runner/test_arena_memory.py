"""Memory of this process that pages lie in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tokenspeed.contracts.errors import MemoryLimitError, UnsupportedError
from tokenspeed.runner.arena import Arena, PageShape
from tokenspeed.runner.arena_memory import HostMemory, TorchMemory
from tokenspeed.runner.layout import page_layout


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def test_sleeping_gives_the_memory_back_and_keeps_the_address() -> None:
    size = 96 * 2**20 + 4097
    before = resident()
    memory = HostMemory(size)
    assert resident() - before < size // 8  # untouched pages cost nothing
    data, at = memory.data, memory.data.data_ptr()
    data.fill_(5)
    assert resident() - before > 0.9 * size
    memory.sleep()
    memory.sleep()
    assert resident() - before < size // 8
    memory.wake()
    assert (data.shape, memory.data.data_ptr()) == ((size,), at)
    assert int(data[:: 2**20].sum()) == 0
    data.fill_(6)
    assert resident() - before > 0.9 * size
    memory.close()
    assert resident() - before < size // 8


def test_more_than_there_are_addresses() -> None:
    with pytest.raises(MemoryLimitError, match=f"{2**62} bytes for the KV cache"):
        HostMemory(2**62)


def test_memory_of_torch_says_why_it_cannot_sleep() -> None:
    memory = TorchMemory(100, torch.device("cpu"), "a reason")
    with pytest.raises(UnsupportedError, match="cannot sleep: a reason"):
        memory.sleep()
    assert memory.data.shape == (100,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_an_arena_lies_over_its_memory(dtype: torch.dtype) -> None:
    shape = PageShape(page_layout((0, 0, 5)), 3, 2, 32, dtype)
    memory = HostMemory(7 * shape.page_bytes + 100)
    arena = Arena(7, shape, torch.device("cpu"), memory)
    assert arena.kv.data_ptr() == memory.data.data_ptr()
    assert arena.kv.nbytes == 7 * shape.page_bytes
    arena.kv.view(torch.uint8)[2] = 9
    arena.copy([(2, 6)])
    assert bool((arena.kv[6].view(torch.uint8) == 9).all())
    arena.sleep()
    arena.wake()
    assert not arena.kv.view(torch.uint8).any()
