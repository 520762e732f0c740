"""How many pages, and how long a sequence: what the memory set aside for the KV cache can hold."""

from __future__ import annotations

from dataclasses import dataclass

from tokenspeed.cache.groups import GroupSpec
from tokenspeed.contracts.errors import MemoryLimitError


@dataclass(frozen=True)
class Capacity:
    """Pages of the pool, and most tokens of one sequence."""

    num_pages: int
    max_model_len: int


def fit_capacity(
    groups: tuple[GroupSpec, ...],
    page_size: int,
    page_bytes: int,
    *,
    cache_bytes: int,
    free_bytes: int,
    asked_len: int | None,
    context: int,
    max_num_seqs: int,
    flag: str = "--kv-cache-memory-bytes",
) -> Capacity:
    """Capacity of `cache_bytes`, at most what `max_num_seqs` sequences could fill. flag: the one that gives more.

    Fewer pages than that are no error: fewer sequences run at once, as admission forecasts, and the others wait.
    A length that was asked for must fit; the model's own context is lowered to what fits. Raises MemoryLimitError with
    what is needed, what is there, and the flags that help.
    """
    pages = cache_bytes // page_bytes
    length = asked_len if asked_len is not None else _longest(groups, page_size, pages, context)
    needed = _pages(groups, page_size, max(length, 2))
    if pages < needed:
        raise MemoryLimitError(
            f"the KV cache of one sequence of {max(length, 2)} tokens needs {_mib(needed * page_bytes)} MiB; "
            f"{_mib(cache_bytes)} MiB are set aside, {_mib(free_bytes)} MiB free: "
            f"raise {flag}, or lower --max-model-len or --kv-cache-dtype"
        )
    most = max_num_seqs * len(groups) * -(-length // page_size)
    return Capacity(min(pages, most), length)


def _pages(groups: tuple[GroupSpec, ...], page_size: int, length: int) -> int:
    # The last token of a sequence is sampled and never fed, so it needs no place.
    return sum(group.most_pages(length - 1, page_size) for group in groups)


def _longest(groups: tuple[GroupSpec, ...], page_size: int, pages: int, context: int) -> int:
    low, high = 0, context
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _pages(groups, page_size, middle) <= pages else (low, middle - 1)
    return low


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"
