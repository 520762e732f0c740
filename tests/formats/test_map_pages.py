"""Pages of a mapped file go when they are done with, and nothing else does."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from tests.seeds import SEED
from tokenspeed.formats.checkpoint import drop_pages, map_file

PAGE = mmap.PAGESIZE


def resident(path: Path) -> int:
    """Bytes of a mapped file that are in this process's memory."""
    entries = Path("/proc/self/smaps").read_text().splitlines()
    total, inside = 0, False
    for line in entries:
        key = line.split(maxsplit=1)[0]
        if not key.endswith(":"):
            inside = line.endswith(str(path))
        elif inside and key == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
@pytest.mark.parametrize("pages, more", [(9, 0), (40, 17), (3, PAGE - 1)])
def test_pages_wholly_within_a_view_go(tmp_path: Path, pages: int, more: int, seed: int) -> None:
    rng = np.random.default_rng([seed, pages])
    raw = rng.bytes(pages * PAGE + more)
    path = tmp_path / "data"
    path.write_bytes(raw)
    mapped = map_file(path)
    held = -(-len(raw) // PAGE) * PAGE
    for _ in range(5):
        first, last = sorted(int(x) for x in rng.integers(0, len(raw) + 1, 2))
        assert int(mapped[::PAGE].sum()) >= 0
        assert resident(path) == held
        drop_pages(mapped[first:][: last - first])
        end = held if last == len(raw) else last // PAGE * PAGE
        assert resident(path) == held - max(0, end - -(-first // PAGE) * PAGE)
        assert mapped.tobytes() == raw
    drop_pages(mapped)
    assert resident(path) == 0


def test_other_memory_is_left(tmp_path: Path) -> None:
    plain = np.ones(16 * PAGE, np.uint8)
    anonymous = np.frombuffer(mmap.mmap(-1, 4), np.uint8)
    for memory in (plain, plain[PAGE:], np.frombuffer(bytes(8 * PAGE), np.uint8)):
        before = memory.copy()
        drop_pages(memory)
        assert (memory == before).all()
    drop_pages(anonymous[:0])
