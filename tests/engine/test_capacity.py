"""What the memory of the KV cache holds."""

from __future__ import annotations

from typing import Any

import pytest

from tokenspeed.cache.groups import GroupSpec
from tokenspeed.contracts.errors import MemoryLimitError
from tokenspeed.engine.capacity import Capacity, fit_capacity

FULL = (GroupSpec(),)


def fit(cache_bytes: int, groups: tuple[GroupSpec, ...] = FULL, **changes: Any) -> Capacity:
    settings: dict[str, Any] = {"free_bytes": 5000, "asked_len": None, "context": 1000, "max_num_seqs": 3}
    return fit_capacity(groups, 16, 100, cache_bytes=cache_bytes, **settings | changes)


def test_pages_fit_the_budget_or_the_need() -> None:
    assert fit(100 * 63) == Capacity(63, 1000)
    assert fit(10**9) == Capacity(3 * 63, 1000)
    assert fit(100 * 10) == Capacity(10, 161)  # the last token sampled needs no place
    assert fit(100 * 10, asked_len=161) == Capacity(10, 161)


def test_windows_need_little() -> None:
    groups = (GroupSpec(), GroupSpec(64), GroupSpec(64))
    alone = fit(100 * 30, groups)
    # 5 pages each for the windows leave 20 for the full group.
    assert alone.max_model_len == 20 * 16 + 1


@pytest.mark.parametrize(("budget", "asked"), [(99, None), (99, 2), (100 * 10, 162)])
def test_too_little_memory_says_what_helps(budget: int, asked: int | None) -> None:
    with pytest.raises(MemoryLimitError, match=r"needs .* MiB.*--kv-cache-memory-bytes.*--max-model-len"):
        fit(budget, asked_len=asked)
