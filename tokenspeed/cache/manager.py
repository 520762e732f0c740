"""What the scheduler asks of the cache: find, take, grow, commit, fork, free. Ids only."""

from __future__ import annotations

from tokenspeed.cache.events import CacheListener
from tokenspeed.cache.groups import FULL_ONLY, GroupSpec
from tokenspeed.cache.keys import ChainHasher
from tokenspeed.cache.pages import PagePool, PageState
from tokenspeed.cache.prefix import PrefixCache, PrefixStats
from tokenspeed.cache.table import BlockTable, Hit
from tokenspeed.contracts.step import CopyPlan


class CacheManager:
    """Block tables of all groups over one pool of equal pages.

    It knows nothing of steps: whoever calls `free` or `release` has waited for the steps that may touch the pages.
    """

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        root: bytes,
        groups: tuple[GroupSpec, ...] = FULL_ONLY,
        *,
        enable_prefix_caching: bool = True,
        listener: CacheListener | None = None,
    ) -> None:
        """`page_size` in tokens; `root` from `keys.root_key`."""
        self.page_size = page_size
        self.groups = groups
        self._root = root
        self._caching = enable_prefix_caching
        self._pool = PagePool(num_pages)
        self._prefix = PrefixCache(self._pool, groups, page_size)
        self._prefix.listener = listener
        self._listener = listener

    @property
    def num_pages(self) -> int:
        return self._pool.num_pages

    @property
    def num_available(self) -> int:
        """Pages that nobody holds; idle ones are evicted when they are needed."""
        return self._pool.num_available

    @property
    def num_held(self) -> int:
        return self._pool.num_pages - self._pool.num_available

    @property
    def num_cached_pages(self) -> int:
        """Pages that a prefix could hit, held or not."""
        return len(self._prefix)

    @property
    def stats(self) -> PrefixStats:
        return self._prefix.stats

    def most_pages(self, num_tokens: int) -> int:
        """Pages without which one sequence alone cannot compute `num_tokens` tokens."""
        return sum(group.most_pages(num_tokens, self.page_size) for group in self.groups)

    def open(self, cache_salt: str = "") -> BlockTable:
        """An empty table. Takes nothing yet."""
        extra_key = cache_salt.encode("utf-8", "surrogatepass")
        hasher = ChainHasher(self._root, self.page_size, extra_key) if self._caching else None
        return BlockTable(hasher, [[] for _ in self.groups], [0] * len(self.groups))

    def find(self, table: BlockTable, token_ids: list[int]) -> Hit:
        """The longest cached prefix that leaves at least one token to compute."""
        if table.hasher is None:
            return Hit()
        num_pages = (len(token_ids) - 1) // self.page_size
        table.hasher.extend(token_ids, num_pages)
        keys = table.hasher.keys[:num_pages]
        length = self._prefix.longest(keys)
        pages = self._prefix.lookup(keys, length)
        live = [page for column in pages for page in column if page >= 0]
        num_idle = sum(map(self._pool.is_idle, live))
        return Hit(length * self.page_size, pages, len(live) - num_idle, num_idle)

    def may_find_more(self, table: BlockTable, token_ids: list[int], hit: Hit) -> bool:
        """Whether `find` may give more than this earlier hit, in O(groups)."""
        if table.hasher is None or hit.num_tokens + self.page_size >= len(token_ids):
            return False
        return self._prefix.has_next(table.hasher.keys, hit.num_tokens // self.page_size)

    def take(self, table: BlockTable, hit: Hit) -> None:
        """Start an empty table with the pages of a hit. Raises RuntimeError on a table that holds something."""
        if table.num_entries:
            raise RuntimeError("block table that holds pages cannot start anew")
        if not hit.num_tokens:
            return
        for group, pages in enumerate(hit.pages):
            live = [page for page in pages if page >= 0]
            for page in live:
                self._pool.acquire(page)
            table.pages[group] = pages.copy()
            table.first_live[group] = len(pages) - len(live)
        table.num_entries = table.num_full = hit.num_tokens // self.page_size
        table.num_positions = hit.num_tokens
        table.num_shared = hit.num_held

    def count_query(self, num_tokens: int, num_hit: int) -> None:
        """Count a request that looked for its prefix."""
        if self._caching:
            self._prefix.count_query(num_tokens, num_hit)

    def room(self, table: BlockTable) -> int:
        """Positions that `grow` could cover now."""
        return (table.num_entries + self._pool.num_available // len(self.groups)) * self.page_size

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        """Append entries until the first `num_tokens` positions have pages. RuntimeError beyond `room`."""
        count = -(-num_tokens // self.page_size) - table.num_entries
        if count <= 0:
            return
        pages = self._allocate(count * len(self.groups))
        for group, column in enumerate(table.pages):
            column += pages[group * count : (group + 1) * count]
        table.num_entries += count
        table.num_positions += count * self.page_size

    def next_boundary(self, position: int, limit: int) -> int:
        """The furthest position up to `limit` at which a chunk that starts at `position` may end. With pages alone that
        is `limit`; state that is kept at page borders will allow multiples of the page size only."""
        return max(position, limit)

    def commit(self, table: BlockTable, token_ids: list[int], num_computed: int) -> list[int]:
        """The KV of the first `num_computed` of `token_ids` is in the pages: those that are full become shareable.

        Returns the pages that fell out of windows. The table has forgotten them but they are still held: pass them to
        `release` when no step that may touch them is in flight.
        """
        num_full = num_computed // self.page_size
        if num_full <= table.num_full:
            return []
        if num_full > table.num_entries:
            raise RuntimeError(f"{num_computed} tokens computed, {table.num_entries} pages held")
        if table.hasher is not None:
            table.hasher.extend(token_ids, num_full)
        for index in range(table.num_full, num_full):
            for group, column in enumerate(table.pages):
                if column[index] >= 0:
                    self._settle(table, group, index, token_ids)
        table.num_full = num_full
        return self._slide(table, num_computed)

    def can_fork(self, table: BlockTable, num_tokens: int) -> bool:
        """Whether `table` still holds all that a copy of its first `num_tokens` positions needs."""
        return table.num_positions >= num_tokens and all(
            first <= group.first_live(num_tokens, self.page_size)
            for first, group in zip(table.first_live, self.groups, strict=True)
        )

    def fork_pages(self, num_tokens: int) -> int:
        """Pages that `fork` allocates."""
        return len(self.groups) if num_tokens % self.page_size else 0

    def fork(self, table: BlockTable, num_tokens: int) -> tuple[BlockTable, CopyPlan]:
        """A table for the same first `num_tokens` positions: full pages are shared, partly filled ones copied.

        The copies are valid once the steps that write those positions are launched. Their sources stay held: pass them
        to `release` when the copies are done. Raises RuntimeError when the pages are gone, or none is available.
        """
        if not self.can_fork(table, num_tokens):
            raise RuntimeError(f"a block table with {table.num_positions} positions cannot be forked at {num_tokens}")
        num_full = num_tokens // self.page_size
        twins = self._allocate(self.fork_pages(num_tokens))
        hasher = table.hasher.copy(num_full) if table.hasher is not None else None
        forked = BlockTable(hasher, [], [], num_full, num_shared=0)
        for group, column in zip(self.groups, table.pages, strict=True):
            first = min(num_full, group.first_live(num_tokens, self.page_size))
            shared = column[first:num_full]
            for page in shared:
                self._pool.acquire(page)
            forked.pages.append([-1] * first + shared)
            forked.first_live.append(first)
            forked.num_shared += len(shared)
        sources = [column[num_full] for column in table.pages] if twins else []
        for source, twin, column in zip(sources, twins, forked.pages, strict=bool(twins)):
            self._pool.acquire(source)
            column.append(twin)
        forked.num_entries += bool(twins)
        forked.num_positions = forked.num_entries * self.page_size
        return forked, CopyPlan(list(zip(sources, twins, strict=True)))

    def free(self, table: BlockTable, token_ids: list[int]) -> None:
        """Give everything back; the table is empty again. Last entry first: a chain is evicted from its tail."""
        for index in reversed(range(table.num_entries)):
            for group, column in enumerate(table.pages):
                if (page := column[index]) < 0:
                    continue
                if self._pool.state(page) is PageState.READY:
                    self._keep(table, group, index, token_ids)
                self._pool.release(page)
        table.pages = [[] for _ in self.groups]
        table.first_live = [0] * len(self.groups)
        table.num_entries = table.num_positions = table.num_full = table.num_shared = 0

    def release(self, pages: list[int]) -> None:
        """Give back pages that `commit` or `fork` left held."""
        for page in pages:
            self._pool.release(page)

    def reset(self) -> int:
        """Drop every cached page that no sequence holds; returns how many."""
        return self._prefix.reset()

    def leaked(self) -> list[int]:
        """Pages held; with no sequence alive there must be none."""
        return self._pool.leaked()

    def check_idle(self) -> None:
        """Prove, with no sequence alive, that nothing leaked. Raises RuntimeError."""
        self._pool.check_idle()
        if self._pool.num_idle != len(self._prefix):
            raise RuntimeError(f"{len(self._prefix)} keys for {self._pool.num_idle} idle pages")

    def _allocate(self, count: int) -> list[int]:
        if (shortage := count - self._pool.num_free) > 0:
            self._prefix.evict(shortage)
        return self._pool.allocate(count)

    def _settle(self, table: BlockTable, group: int, index: int, token_ids: list[int]) -> None:
        """A page is full. One that was shared while it filled has been settled by the first of its holders."""
        page = table.pages[group][index]
        if self._pool.state(page) is PageState.FILLING:
            self._pool.mark_ready(page)
        if self._pool.state(page) is PageState.READY:
            self._store(table, group, index, token_ids)

    def _store(self, table: BlockTable, group: int, index: int, token_ids: list[int]) -> bool:
        """Put a full page under its key unless another page has that."""
        if table.hasher is None:
            return False
        keys = table.hasher.keys
        stored = self._prefix.insert(group, keys[index], table.pages[group][index])
        if stored and self._listener is not None:
            parent = keys[index - 1] if index else self._root
            tokens = token_ids[index * self.page_size : (index + 1) * self.page_size]
            self._listener.on_stored(keys[index], parent, tokens, group)
        return stored

    def _keep(self, table: BlockTable, group: int, index: int, token_ids: list[int]) -> None:
        """A full page without a key is about to be released: it, or the page its key has now, counts as just used. A
        copy that ends before its first commit has no keys yet for what it shares."""
        if table.hasher is None:
            return
        table.hasher.extend(token_ids, index + 1)
        if not self._store(table, group, index, token_ids):
            self._prefix.touch(group, table.hasher.keys[index])

    def _slide(self, table: BlockTable, num_computed: int) -> list[int]:
        dead: list[int] = []
        for number, group in enumerate(self.groups):
            start, column = table.first_live[number], table.pages[number]
            end = group.first_live(num_computed, self.page_size)
            if end > start:
                dead += column[start:end]
                column[start:end] = [-1] * (end - start)
                table.first_live[number] = end
        return dead
