from __future__ import annotations

import random

import pytest

from tests.seeds import SEED
from tokenspeed.cache.groups import FULL_ONLY, GroupSpec
from tokenspeed.cache.pages import PagePool, PageState
from tokenspeed.cache.prefix import PrefixCache


def ready_page(pool: PagePool) -> int:
    (page,) = pool.allocate(1)
    pool.mark_ready(page)
    return page


def make_cache(num_pages: int, groups: tuple[GroupSpec, ...] = FULL_ONLY) -> tuple[PagePool, PrefixCache]:
    pool = PagePool(num_pages)
    return pool, PrefixCache(pool, groups, 4)


def make_chain(pool: PagePool, cache: PrefixCache, keys: list[bytes], group: int = 0) -> list[int]:
    pages = []
    for key in keys:
        pages.append(ready_page(pool))
        assert cache.insert(group, key, pages[-1])
    return pages


def test_lookup_stops_at_the_first_miss():
    pool, cache = make_cache(4)
    pages = make_chain(pool, cache, [b"a", b"b", b"d"])
    keys = [b"a", b"b", b"c", b"d"]
    assert cache.longest(keys) == 2
    assert cache.lookup(keys, 2) == [pages[:2]]
    assert cache.longest([b"x", b"a"]) == 0
    assert len(cache) == 3


def test_has_next_says_whether_a_hit_grew():
    pool, cache = make_cache(4)
    make_chain(pool, cache, [b"a"])
    assert not cache.has_next([b"a", b"b"], 1)
    make_chain(pool, cache, [b"b"])
    assert cache.has_next([b"a", b"b"], 1)
    assert not cache.has_next([b"a", b"b"], 2)


def test_only_ready_pages_enter():
    pool, cache = make_cache(2)
    (page,) = pool.allocate(1)
    with pytest.raises(RuntimeError, match="FILLING to CACHED"):
        cache.insert(0, b"a", page)
    assert cache.longest([b"a"]) == 0


def test_the_first_page_of_a_key_stays_and_the_second_is_private():
    pool, cache = make_cache(3)
    (first,) = make_chain(pool, cache, [b"a"])
    second = ready_page(pool)
    assert not cache.insert(0, b"a", second)
    assert pool.state(second) is PageState.READY
    pool.release(second)
    assert (cache.lookup([b"a"], 1), pool.num_free) == ([[first]], 2)


def test_held_pages_survive_eviction_and_reset():
    pool, cache = make_cache(3)
    keys = [b"a", b"b", b"c"]
    pages = make_chain(pool, cache, keys)
    for page in reversed(pages):
        pool.release(page)
    pool.acquire(pages[0])
    cache.evict(1)
    assert cache.longest(keys) == 2
    assert cache.reset() == 1
    assert cache.longest(keys) == 1
    assert (pool.num_free, pool.num_idle, pool.leaked()) == (2, 0, pages[:1])


def test_touch_makes_a_key_the_last_to_go():
    pool, cache = make_cache(4)
    pages = make_chain(pool, cache, [b"a", b"b"])
    for page in pages:
        pool.release(page)
    cache.touch(0, b"a")
    assert pool.idle_pages() == [pages[1], pages[0]]


def test_groups_have_keys_of_their_own():
    pool, cache = make_cache(4, (GroupSpec(), GroupSpec()))
    first, second = make_chain(pool, cache, [b"a"]), make_chain(pool, cache, [b"a"], group=1)
    assert cache.lookup([b"a"], 1) == [first, second]
    pool.release(second[0])
    cache.evict(1)
    assert cache.longest([b"a"]) == 0


@pytest.mark.parametrize("seed", [SEED + i for i in range(20)])
def test_the_longest_hit_is_what_every_group_holds(seed):
    """Against the definition, tried from the longest prefix down, with random pages missing."""
    rng = random.Random(seed)
    windows = [rng.choice([0, 1, 2, 4, 5, 9, 13]) for _ in range(rng.randint(1, 3))]
    keys = [bytes([i]) for i in range(rng.randint(1, 9))]
    pool, cache = make_cache(64, tuple(map(GroupSpec, windows)))
    present = [[rng.random() < 0.8 for _ in keys] for _ in windows]
    for group, row in enumerate(present):
        make_chain(pool, cache, [key for key, there in zip(keys, row, strict=True) if there], group)

    def holds(length: int) -> bool:
        query = 4 * length
        for window, row in zip(windows, present, strict=True):
            first = max(0, query - window + 1) if window else 0
            if not all(row[position // 4] for position in range(first, query)):
                return False
        return True

    length = next(length for length in range(len(keys), -1, -1) if holds(length))
    assert cache.longest(keys) == length
    for window, row in zip(windows, cache.lookup(keys, length), strict=True):
        dead = max(0, 4 * length - window + 1) // 4 if window else 0
        assert [page == -1 for page in row] == [index < dead for index in range(length)]
