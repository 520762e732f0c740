"""The prefix cache: which page holds the KV of which chain of tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from tokenspeed.cache.pages import PagePool


@dataclass
class PrefixStats:
    """Totals over admitted requests that read the cache, in tokens but for `queries` (requests)."""

    queries: int = 0
    queried_tokens: int = 0
    hit_tokens: int = 0


class PrefixCache:
    """Maps chain keys to full pages. A key names the whole prefix, so a flat map is the tree.

    Every page that enters or leaves does so in `insert` or `evict`.
    """

    def __init__(self, pool: PagePool) -> None:
        self._pool = pool
        self._pages: dict[bytes, int] = {}
        self._keys: dict[int, bytes] = {}
        self.stats = PrefixStats()

    def __len__(self) -> int:
        return len(self._pages)

    def lookup(self, keys: Iterable[bytes]) -> list[int]:
        """Pages of the longest cached prefix of a chain of keys. They are not pinned."""
        pages = []
        for key in keys:
            page = self._pages.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def pin(self, pages: Iterable[int]) -> None:
        """Hold pages that `lookup` gave; each is handed back with the pool's `release`."""
        for page in pages:
            self._pool.acquire(page)

    def insert(self, key: bytes, page: int) -> bool:
        """Put a READY page under its key. False when the key has a page: that one stays and this one is private."""
        if key in self._pages:
            return False
        self._pool.mark_cached(page)
        self._pages[key] = page
        self._keys[page] = key
        return True

    def keep(self, key: bytes, page: int) -> None:
        """A private READY page is about to be released: let it, or the page its key has now, count as just used."""
        if not self.insert(key, page):
            self._pool.touch(self._pages[key])

    def evict(self, count: int) -> None:
        """Free the `count` idle pages used longest ago."""
        for page in self._pool.evict(count):
            del self._pages[self._keys.pop(page)]

    def reset(self) -> int:
        """Drop every page that nobody holds; returns how many."""
        count = self._pool.num_idle
        self.evict(count)
        return count

    def count_query(self, num_tokens: int, num_hit: int) -> None:
        self.stats.queries += 1
        self.stats.queried_tokens += num_tokens
        self.stats.hit_tokens += num_hit
