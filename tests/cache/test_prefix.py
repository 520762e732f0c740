from __future__ import annotations

import pytest

from tokenspeed.cache.pages import PagePool, PageState
from tokenspeed.cache.prefix import PrefixCache


def ready_page(pool: PagePool) -> int:
    (page,) = pool.allocate(1)
    pool.mark_ready(page)
    return page


def make_chain(pool: PagePool, cache: PrefixCache, keys: list[bytes]) -> list[int]:
    pages = []
    for key in keys:
        pages.append(ready_page(pool))
        assert cache.insert(key, pages[-1])
    return pages


def test_lookup_stops_at_the_first_miss():
    pool = PagePool(4)
    cache = PrefixCache(pool)
    pages = make_chain(pool, cache, [b"a", b"b", b"d"])
    assert cache.lookup([b"a", b"b", b"c", b"d"]) == pages[:2]
    assert cache.lookup([b"x", b"a"]) == []
    assert len(cache) == 3


def test_only_ready_pages_enter():
    pool = PagePool(2)
    cache = PrefixCache(pool)
    (page,) = pool.allocate(1)
    with pytest.raises(RuntimeError, match="FILLING to CACHED"):
        cache.insert(b"a", page)
    assert cache.lookup([b"a"]) == []


def test_the_first_page_of_a_key_stays_and_the_second_is_private():
    pool = PagePool(3)
    cache = PrefixCache(pool)
    (first,) = make_chain(pool, cache, [b"a"])
    second = ready_page(pool)
    assert not cache.insert(b"a", second)
    assert pool.state(second) is PageState.READY
    pool.release(second)
    assert (cache.lookup([b"a"]), pool.num_free) == ([first], 2)


def test_pinned_pages_survive_eviction_and_reset():
    pool = PagePool(3)
    cache = PrefixCache(pool)
    pages = make_chain(pool, cache, [b"a", b"b", b"c"])
    for page in reversed(pages):
        pool.release(page)
    cache.pin(pages[:1])
    cache.evict(1)
    assert cache.lookup([b"a", b"b", b"c"]) == pages[:2]
    assert cache.reset() == 1
    assert cache.lookup([b"a", b"b"]) == pages[:1]
    assert (pool.num_free, pool.num_idle, pool.leaked()) == (2, 0, pages[:1])


def test_keep_refreshes_the_page_of_the_key_or_becomes_it():
    pool = PagePool(4)
    cache = PrefixCache(pool)
    pages = make_chain(pool, cache, [b"a", b"b"])
    for page in pages:
        pool.release(page)
    private = ready_page(pool)
    cache.keep(b"a", private)
    assert pool.idle_pages() == [pages[1], pages[0]]
    cache.reset()
    cache.keep(b"a", private)
    assert cache.lookup([b"a"]) == [private]
