from __future__ import annotations

import pytest

from tokenspeed.cache.pages import PagePool, PageState


def cached_page(pool: PagePool) -> int:
    (page,) = pool.allocate(1)
    pool.mark_ready(page)
    pool.mark_cached(page)
    return page


def test_a_page_goes_through_its_states():
    pool = PagePool(3)
    page = cached_page(pool)
    assert (pool.num_free, pool.num_idle, pool.state(page)) == (2, 0, PageState.CACHED)
    pool.acquire(page)
    pool.release(page)
    assert pool.references(page) == 1
    pool.release(page)
    assert (pool.num_free, pool.num_idle, pool.leaked()) == (2, 1, [])
    pool.check_idle()
    assert pool.evict(1) == [page]
    assert (pool.num_free, pool.num_idle, pool.state(page)) == (3, 0, PageState.FREE)
    pool.check_idle()


def test_every_page_is_handed_out_once():
    pool = PagePool(7)
    pages = pool.allocate(3) + pool.allocate(4)
    assert sorted(pages) == list(range(7))
    with pytest.raises(RuntimeError, match="1 pages wanted, 0 free"):
        pool.allocate(1)
    for page in pages:
        pool.release(page)
    assert pool.num_free == 7


def test_eviction_takes_the_least_recently_used():
    pool = PagePool(5)
    pages = [cached_page(pool) for _ in range(5)]
    for page in pages:
        pool.release(page)
    pool.acquire(pages[0])
    pool.release(pages[0])
    pool.touch(pages[2])
    pool.acquire(pages[1])
    assert pool.idle_pages() == [pages[3], pages[4], pages[0], pages[2]]
    pool.touch(pages[1])
    assert pool.evict(2) == [pages[3], pages[4]]
    with pytest.raises(RuntimeError, match="3 pages to evict, 2 idle"):
        pool.evict(3)


def test_a_page_is_free_when_its_last_holder_lets_go():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    pool.acquire(page)
    pool.release(page)
    assert (pool.references(page), pool.num_available) == (1, 1)
    pool.release(page)
    assert (pool.state(page), pool.num_available) == (PageState.FREE, 2)


def test_misuse_raises():
    pool = PagePool(2)
    (page,) = pool.allocate(1)
    with pytest.raises(RuntimeError, match="FILLING to CACHED"):
        pool.mark_cached(page)
    with pytest.raises(RuntimeError, match="is FREE and cannot be shared"):
        pool.acquire(1 - page)
    pool.mark_ready(page)
    with pytest.raises(RuntimeError, match="READY to READY"):
        pool.mark_ready(page)
    pool.release(page)
    with pytest.raises(RuntimeError, match="not held"):
        pool.release(page)
    with pytest.raises(RuntimeError, match="not held"):
        pool.mark_ready(page)
    for unknown in (-1, 2):
        with pytest.raises(RuntimeError, match="unknown page"):
            pool.release(unknown)


def test_a_leak_is_named():
    pool = PagePool(4)
    pages = pool.allocate(2)
    pool.release(pages[0])
    assert pool.leaked() == [pages[1]]
    with pytest.raises(RuntimeError, match=rf"1 leaked pages: \[{pages[1]}\]"):
        pool.check_idle()
