"""The prefix cache: which page of a group holds the KV of which chain of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tokenspeed.cache.events import CacheListener
from tokenspeed.cache.groups import GroupSpec
from tokenspeed.cache.pages import PagePool


@dataclass
class PrefixStats:
    """Totals over admitted requests that read the cache, in tokens but for `queries` (requests)."""

    queries: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0


class PrefixCache:
    """Maps chain keys to full pages, one map per group. A key names the whole prefix, so a flat map is the tree.

    Every page that enters or leaves does so in `insert` or `evict`.
    """

    def __init__(self, pool: PagePool, groups: Sequence[GroupSpec], page_size: int) -> None:
        self._pool = pool
        self._groups = groups
        self._page_size = page_size
        self._pages: list[dict[bytes, int]] = [{} for _ in groups]
        self._keys: dict[int, tuple[int, bytes]] = {}
        self._full = [pages for pages, group in zip(self._pages, groups, strict=True) if not group.window]
        self._windows = [(pages, group) for pages, group in zip(self._pages, groups, strict=True) if group.window]
        self.listener: CacheListener | None = None
        self.stats = PrefixStats()

    def __len__(self) -> int:
        return len(self._keys)

    def longest(self, keys: Sequence[bytes]) -> int:
        """Length, in pages, of the longest prefix of a chain that every group holds as far as the next token needs."""
        length = len(keys)
        for pages in self._full:
            length = next((index for index in range(length) if keys[index] not in pages), length)
        return self._longest_in_windows(keys, length) if self._windows else length

    def has_next(self, keys: Sequence[bytes], length: int) -> bool:
        """Whether a hit of `length` pages may have become longer since."""
        return length < len(keys) and all(keys[length] in pages for pages in self._pages)

    def lookup(self, keys: Sequence[bytes], length: int) -> list[list[int]]:
        """Pages of a prefix per group, -1 for those outside its window. They are not pinned."""
        tables = []
        for pages, group in zip(self._pages, self._groups, strict=True):
            first = min(length, group.first_live(length * self._page_size, self._page_size))
            tables.append([-1] * first + [pages[key] for key in keys[first:length]])
        return tables

    def insert(self, group: int, key: bytes, page: int) -> bool:
        """Put a READY page under its key. False when the key has a page: that one stays and this one is private."""
        if key in self._pages[group]:
            return False
        self._pool.mark_cached(page)
        self._pages[group][key] = page
        self._keys[page] = (group, key)
        return True

    def touch(self, group: int, key: bytes) -> None:
        """Let the page of a key count as just used."""
        self._pool.touch(self._pages[group][key])

    def evict(self, count: int) -> None:
        """Free the `count` idle pages used longest ago."""
        for page in self._pool.evict(count):
            group, key = self._keys.pop(page)
            del self._pages[group][key]
            if self.listener is not None:
                self.listener.on_removed(key, group)

    def reset(self) -> int:
        """Drop every page that nobody holds; returns how many."""
        count = self._pool.num_idle
        self.evict(count)
        return count

    def count_query(self, num_tokens: int, num_hit: int) -> None:
        self.stats.queries += 1
        self.stats.queried_tokens += num_tokens
        self.stats.hit_tokens += num_hit

    def _longest_in_windows(self, keys: Sequence[bytes], most: int) -> int:
        """The longest prefix of at most `most` pages at whose end each window is whole: one pass, counting for each
        group the pages present without a gap."""
        runs = [0] * len(self._windows)
        longest = 0
        for index in range(most):
            length = index + 1
            whole = True
            for number, (pages, group) in enumerate(self._windows):
                runs[number] = runs[number] + 1 if keys[index] in pages else 0
                first = group.first_live(length * self._page_size, self._page_size)
                whole = whole and runs[number] >= length - first
            longest = length if whole else longest
        return longest
