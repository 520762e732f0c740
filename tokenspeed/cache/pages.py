"""Page ids: who holds them, what state they are in, which may be taken back. The bytes belong to the runner's arena."""

from __future__ import annotations

from collections import OrderedDict
from enum import IntEnum


class PageState(IntEnum):
    """FREE: in the free list. FILLING: its sequence still writes it. READY: full, read only. CACHED: also has a key."""

    FREE = 0
    FILLING = 1
    READY = 2
    CACHED = 3


TRANSITIONS: dict[PageState, frozenset[PageState]] = {
    PageState.FREE: frozenset({PageState.FILLING}),
    PageState.FILLING: frozenset({PageState.READY, PageState.FREE}),
    PageState.READY: frozenset({PageState.CACHED, PageState.FREE}),
    PageState.CACHED: frozenset({PageState.FREE}),
}


class PagePool:
    """Hands out page ids 0 .. num_pages - 1 and takes them back, reference-counted; every operation is O(1) a page.

    A cached page without references is idle: it keeps its content until it is evicted, least recently used first.
    Misuse (double free, unknown page, forbidden transition, too few pages) is a bug here, not a user's: RuntimeError.
    """

    def __init__(self, num_pages: int) -> None:
        self._states = [PageState.FREE] * num_pages
        self._refs = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()

    @property
    def num_pages(self) -> int:
        return len(self._states)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_idle(self) -> int:
        return len(self._idle)

    @property
    def num_available(self) -> int:
        """Pages that nobody holds: free or idle."""
        return len(self._free) + len(self._idle)

    def state(self, page: int) -> PageState:
        self._check_known(page)
        return self._states[page]

    def references(self, page: int) -> int:
        self._check_known(page)
        return self._refs[page]

    def is_idle(self, page: int) -> bool:
        return page in self._idle

    def idle_pages(self) -> list[int]:
        """Idle pages in the order in which they would be evicted."""
        return list(self._idle)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free pages; each is FILLING with one reference."""
        if count > len(self._free):
            raise RuntimeError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._move(page, PageState.FILLING)
            self._refs[page] = 1
        return pages

    def acquire(self, page: int) -> None:
        """Add a reference to a page that is held, or idle."""
        if self.state(page) is PageState.FREE:
            raise RuntimeError(f"page {page} is FREE and cannot be shared")
        self._refs[page] += 1
        self._idle.pop(page, None)

    def release(self, page: int) -> None:
        """Drop a reference. Without the last one a cached page turns idle, any other is free."""
        self._check_held(page)
        self._refs[page] -= 1
        if self._refs[page]:
            return
        if self._states[page] is PageState.CACHED:
            self._idle[page] = None
        else:
            self._move(page, PageState.FREE)
            self._free.append(page)

    def mark_ready(self, page: int) -> None:
        """All tokens of the page are computed."""
        self._check_held(page)
        self._move(page, PageState.READY)

    def mark_cached(self, page: int) -> None:
        """The page has a key."""
        self._check_held(page)
        self._move(page, PageState.CACHED)

    def touch(self, page: int) -> None:
        """Make an idle page the last to be evicted; nothing to do for one that is held."""
        if page in self._idle:
            self._idle.move_to_end(page)

    def evict(self, count: int) -> list[int]:
        """Free the `count` idle pages used longest ago and return them; their keys are void."""
        if count > len(self._idle):
            raise RuntimeError(f"{count} pages to evict, {len(self._idle)} idle")
        pages = [self._idle.popitem(last=False)[0] for _ in range(count)]
        for page in pages:
            self._move(page, PageState.FREE)
            self._free.append(page)
        return pages

    def leaked(self) -> list[int]:
        """Pages that are held. With no sequence alive there must be none."""
        return [page for page, refs in enumerate(self._refs) if refs]

    def check_idle(self) -> None:
        """Prove that nothing is held and every page is free or idle. Raises RuntimeError; O(num_pages)."""
        if leaked := self.leaked():
            raise RuntimeError(f"{len(leaked)} leaked pages: {leaked[:16]}")
        free, idle = set(self._free), set(self._idle)
        for page, state in enumerate(self._states):
            expected = PageState.FREE if page in free else PageState.CACHED
            if state is not expected or (page in free) == (page in idle):
                raise RuntimeError(f"page {page} is {state.name}, free list: {page in free}, idle: {page in idle}")
        if len(free) != len(self._free):
            raise RuntimeError("a page is in the free list twice")

    def _check_known(self, page: int) -> None:
        if not 0 <= page < len(self._states):
            raise RuntimeError(f"unknown page {page} of {len(self._states)}")

    def _check_held(self, page: int) -> None:
        self._check_known(page)
        if not self._refs[page]:
            raise RuntimeError(f"page {page} ({self._states[page].name}) is not held by anyone")

    def _move(self, page: int, state: PageState) -> None:
        old = self._states[page]
        if state not in TRANSITIONS[old]:
            raise RuntimeError(f"page {page} cannot go from {old.name} to {state.name}")
        self._states[page] = state
