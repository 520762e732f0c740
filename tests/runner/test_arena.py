"""The KV arena's memory: reserved, not taken, and in large pages where the system has them."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from tokenspeed.ops.kv import KV_TORCH
from tokenspeed.runner.arena import Arena, PageShape
from tokenspeed.runner.layout import page_layout

MIB = 1 << 20


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def flags_at(address: int) -> list[str]:
    """What the system notes of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(head[1], 16) <= address < int(head[2], 16)
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"no mapping at {address:#x}")


@pytest.mark.parametrize("kv", ["float32", "bfloat16", "fp8", "int8"])
def test_memory_is_taken_when_it_is_touched(kv: str) -> None:
    shape = PageShape(page_layout((0, 64, 64)), 16, 2, 96, KV_TORCH[kv])
    before = resident()
    arena = Arena(64 * MIB // shape.page_bytes + 1, shape, torch.device("cpu"))
    middle = arena.kv[len(arena.kv) // 2]
    middle.view(torch.uint8).fill_(7)
    assert resident() - before < 16 * MIB
    assert ("hg" in flags_at(middle.data_ptr())) == Path("/sys/kernel/mm/transparent_hugepage").exists()


def test_a_copied_page_is_equal_and_its_neighbours_stay() -> None:
    shape = PageShape(page_layout((0, 0)), 3, 2, 48, torch.int8)
    arena = Arena(5, shape, torch.device("cpu"))
    stored = arena.kv.view(torch.uint8)
    for page in range(5):
        stored[page] = page
    arena.copy([(4, 1), (0, 3)])
    assert [stored[page].unique().tolist() for page in range(5)] == [[0], [4], [2], [0], [4]]
