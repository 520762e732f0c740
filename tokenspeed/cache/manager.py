"""What the scheduler asks of the cache: admit, grow, commit, free. Ids only."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed.cache.keys import ChainHasher
from tokenspeed.cache.pages import PagePool, PageState
from tokenspeed.cache.prefix import PrefixCache, PrefixStats
from tokenspeed.contracts.request import Request


@dataclass(slots=True)
class BlockTable:
    """The pages of one sequence, in order of position. Made by `CacheManager.open`, changed by the manager only."""

    max_pages: int
    """Most pages it may come to hold; reserved from admission on."""
    hasher: ChainHasher | None
    """None without prefix caching."""
    reads_cache: bool
    pages: list[int] = field(default_factory=list)
    num_full: int = 0
    """Leading pages that are computed to the end."""
    admitted: bool = False
    refused_at: int = -1
    """The manager's change count when it last did not fit."""


class CacheManager:
    """Block tables over one pool of pages.

    It keeps one inequality: the pages that admitted sequences may still ask for (`max_pages` less what they hold) are
    no more than the free and idle ones. `admit` checks it, everything else preserves it, so `grow` cannot fail.
    """

    def __init__(self, num_pages: int, page_size: int, root: bytes, enable_prefix_caching: bool = True) -> None:
        """`page_size` in tokens; `root` from `keys.root_key`."""
        self.page_size = page_size
        self._root = root
        self._caching = enable_prefix_caching
        self._pool = PagePool(num_pages)
        self._prefix = PrefixCache(self._pool)
        self._promised = 0
        self._changes = 0

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_available(self) -> int:
        """Pages that are neither held nor promised to an admitted sequence."""
        return self._pool.num_free + self._pool.num_idle - self._promised

    @property
    def num_cached_pages(self) -> int:
        """Pages that a prefix could hit, held or not."""
        return len(self._prefix)

    @property
    def stats(self) -> PrefixStats:
        return self._prefix.stats

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def open(self, request: Request, max_computed: int) -> BlockTable:
        """An empty table for a sequence that computes at most `max_computed` tokens. Takes and reserves nothing yet.

        A request for prompt logprobs must compute every position: it fills the cache but does not read it.
        """
        extra_key = request.cache_salt.encode("utf-8", "surrogatepass")
        hasher = ChainHasher(self._root, self.page_size, extra_key) if self._caching else None
        reads_cache = self._caching and request.params.prompt_logprobs is None
        return BlockTable(self.pages_for(max_computed), hasher, reads_cache)

    def match(self, table: BlockTable, token_ids: list[int]) -> tuple[list[int], int]:
        """Pages and tokens of the longest cached prefix that leaves at least one token to compute. Pins nothing."""
        if table.hasher is None or not table.reads_cache:
            return [], 0
        num_pages = (len(token_ids) - 1) // self.page_size
        table.hasher.extend(token_ids, num_pages)
        pages = self._prefix.lookup(table.hasher.keys[:num_pages])
        return pages, len(pages) * self.page_size

    def admit(self, table: BlockTable, token_ids: list[int]) -> int | None:
        """Pin the cached prefix and reserve the rest. Returns the tokens found, or None if it does not fit.

        A hit that others hold costs nothing; an idle one costs its page, which can no longer be evicted.
        After a refusal only a `commit` or `free` can make room, so until then it is refused without a new match.
        """
        if table.admitted:
            raise RuntimeError("block table admitted twice")
        if table.refused_at == self._changes:
            return None
        pages, num_tokens = self.match(table, token_ids)
        num_idle = sum(map(self._pool.is_idle, pages))
        missing = table.max_pages - len(pages)
        if missing + num_idle > self.num_available:
            table.refused_at = self._changes
            return None
        self._prefix.pin(pages)
        if table.reads_cache:
            self._prefix.count_query(len(token_ids), num_tokens)
        table.pages, table.num_full, table.admitted = pages, len(pages), True
        self._promised += missing
        return num_tokens

    def grow(self, table: BlockTable, num_tokens: int) -> list[int]:
        """Append pages until the first `num_tokens` positions have one; returns the new ones."""
        count = self.pages_for(num_tokens) - len(table.pages)
        if count <= 0:
            return []
        if not table.admitted or len(table.pages) + count > table.max_pages:
            raise RuntimeError(f"{num_tokens} tokens need more than the {table.max_pages} pages reserved")
        if (shortage := count - self._pool.num_free) > 0:
            self._prefix.evict(shortage)
        pages = self._pool.allocate(count)
        table.pages += pages
        self._promised -= count
        return pages

    def commit(self, table: BlockTable, token_ids: list[int], num_computed: int) -> None:
        """The KV of the first `num_computed` of `token_ids` is in the pages: those that are full become shareable."""
        num_full = num_computed // self.page_size
        if num_full <= table.num_full:
            return
        if num_full > len(table.pages):
            raise RuntimeError(f"{num_computed} tokens computed, {len(table.pages)} pages held")
        for page in table.pages[table.num_full : num_full]:
            self._pool.mark_ready(page)
        if table.hasher is not None:
            table.hasher.extend(token_ids, num_full)
            for index in range(table.num_full, num_full):
                self._prefix.insert(table.hasher.keys[index], table.pages[index])
        table.num_full = num_full
        self._changes += 1

    def free(self, table: BlockTable) -> None:
        """Give everything back. Last page first, so that a chain is evicted from its tail."""
        if not table.admitted:
            raise RuntimeError("block table freed that holds nothing")
        for index in reversed(range(len(table.pages))):
            page = table.pages[index]
            if table.hasher is not None and self._pool.state(page) is PageState.READY:
                self._prefix.keep(table.hasher.keys[index], page)
            self._pool.release(page)
        self._promised -= table.max_pages - len(table.pages)
        table.pages, table.num_full, table.admitted = [], 0, False
        self._changes += 1

    def reset_prefix_cache(self) -> int:
        """Drop every cached page that no sequence holds; returns how many."""
        return self._prefix.reset()

    def leaked(self) -> list[int]:
        """Pages held; with no sequence admitted there must be none."""
        return self._pool.leaked()

    def check_idle(self) -> None:
        """Prove, with no sequence admitted, that nothing leaked. Raises RuntimeError."""
        self._pool.check_idle()
        if self._promised:
            raise RuntimeError(f"{self._promised} pages promised to no sequence")
        if self._pool.num_idle != len(self._prefix):
            raise RuntimeError(f"{len(self._prefix)} keys for {self._pool.num_idle} idle pages")
