from __future__ import annotations

import random

import pytest

from tests.seeds import SEED
from tokenspeed.cache.groups import FULL_ONLY, GroupSpec
from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import CacheManager
from tokenspeed.cache.table import BlockTable
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.step import CopyPlan

ROOT = root_key("model", "f32", 4)


def make_cache(num_pages: int = 8, groups: tuple[GroupSpec, ...] = FULL_ONLY, caching: bool = True) -> CacheManager:
    return CacheManager(num_pages, 4, ROOT, groups, enable_prefix_caching=caching)


def run(cache: CacheManager, tokens: list[int], salt: str = "", reads: bool = True) -> tuple[BlockTable, int]:
    """Compute all of a sequence; returns its table and the tokens that were cached."""
    table = cache.open(salt)
    cached = 0
    if reads:
        hit = cache.find(table, tokens)
        cache.take(table, hit)
        cached = hit.num_tokens
    cache.grow(table, len(tokens))
    cache.release(cache.commit(table, tokens, len(tokens)))
    return table, cached


def cached_tokens(cache: CacheManager, tokens: list[int]) -> int:
    return cache.find(cache.open(), tokens).num_tokens


@pytest.mark.parametrize("length, cached", [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_a_hit_is_whole_pages_and_leaves_a_token_to_compute(length, cached):
    cache, tokens = make_cache(), list(range(11))
    first, _ = run(cache, tokens)
    hit = cache.find(cache.open(), tokens[:length])
    assert (hit.num_tokens, hit.pages) == (cached, [first.pages[0][: cached // 4]])
    assert (hit.num_held, hit.num_idle) == (cached // 4, 0)
    cache.free(first, tokens)
    assert cache.find(cache.open(), tokens[:length]).num_idle == cached // 4


def test_salts_and_diverging_tokens_do_not_share():
    cache, tokens = make_cache(16), list(range(9))
    run(cache, tokens, salt="a")
    assert run(cache, tokens, salt="b")[1] == 0
    assert run(cache, tokens, salt="a")[1] == 8
    assert run(cache, [*tokens[:6], 99, 7, 8], salt="a")[1] == 4


def test_without_caching_nothing_is_kept():
    cache, tokens = make_cache(caching=False), list(range(9))
    cache.free(run(cache, tokens)[0], tokens)
    assert run(cache, tokens)[1] == 0
    cache.count_query(9, 0)
    assert (cache.num_cached_pages, cache.stats.queries) == (0, 0)


def test_only_computed_pages_enter():
    cache, tokens = make_cache(), list(range(12))
    table = cache.open()
    cache.grow(table, 12)
    assert cache.commit(table, tokens, 7) == []
    assert cached_tokens(cache, tokens) == 4
    cache.free(table, tokens)
    assert (cache.num_cached_pages, cache.num_available) == (1, 8)
    cache.check_idle()


@pytest.mark.parametrize("groups", [1, 2])
def test_grow_covers_exactly_the_positions_asked_for(groups):
    cache = make_cache(8, (GroupSpec(),) * groups)
    table = cache.open()
    assert cache.room(table) == 32 // groups
    counts = []
    for num_tokens in (3, 4, 5, 5, 13):
        cache.grow(table, num_tokens)
        counts.append((table.num_entries, table.num_positions, table.num_held))
    assert counts == [(n, 4 * n, groups * n) for n in (1, 1, 2, 2, 4)]
    assert cache.room(table) == 32 // groups
    with pytest.raises(RuntimeError, match="pages"):
        cache.grow(table, 33)


def test_idle_pages_are_evicted_when_they_are_needed_tail_first():
    cache, tokens = make_cache(num_pages=4), list(range(13))
    cache.free(run(cache, tokens)[0], tokens)
    assert cache.num_available == 4
    for expected in (8, 4, 0):
        filler = cache.open()
        cache.grow(filler, 16 - expected)
        assert cached_tokens(cache, tokens) == expected
        cache.free(filler, [])


def test_a_private_copy_takes_the_key_when_its_twin_was_dropped():
    cache, tokens = make_cache(), list(range(9))
    twin, _ = run(cache, tokens)
    private, _ = run(cache, tokens, reads=False)
    cache.free(twin, tokens)
    assert cache.reset() == 2
    assert cached_tokens(cache, tokens) == 0
    cache.free(private, tokens)
    assert cached_tokens(cache, tokens) == 8
    cache.check_idle()


def test_a_waiting_sequence_sees_when_its_hit_may_have_grown():
    cache, tokens = make_cache(), list(range(9))
    table, other = cache.open(), cache.open()
    hit = cache.find(other, tokens)
    cache.grow(table, 9)
    cache.commit(table, tokens, 3)
    assert not cache.may_find_more(other, tokens, hit)
    cache.commit(table, tokens, 8)
    assert cache.may_find_more(other, tokens, hit)
    assert not cache.may_find_more(other, tokens, cache.find(other, tokens))


def test_window_pages_fall_out_and_come_back_through_release():
    cache, tokens = make_cache(16, (GroupSpec(), GroupSpec(6))), list(range(40))
    table = cache.open()
    cache.grow(table, 13)
    dead = cache.commit(table, tokens, 12)
    # The next query is at 12 and reads 7 to 12: the page of 0 to 3 is out, that of 4 to 7 is not.
    assert table.first_live == [0, 1]
    assert table.pages[1][0] == -1
    assert len(dead) == 1
    assert (cache.num_held, table.num_held) == (8, 7)
    cache.release(dead)
    assert cache.num_held == 7
    cache.free(table, tokens)
    cache.check_idle()


def test_a_window_hit_has_no_pages_before_the_window():
    cache, tokens = make_cache(16, (GroupSpec(), GroupSpec(6))), list(range(13))
    cache.free(run(cache, tokens)[0], tokens)
    hit = cache.find(cache.open(), tokens)
    assert hit.num_tokens == 12
    assert [page >= 0 for page in hit.pages[1]] == [False, True, True]
    table = cache.open()
    cache.take(table, hit)
    assert (table.first_live, table.num_held, cache.num_held) == ([0, 1], 5, 5)
    cache.free(table, tokens)
    cache.check_idle()


def test_the_pages_of_one_sequence_suffice_for_every_length():
    """`most_pages` is what a sequence holds at worst when it is computed one token at a time."""
    rng = random.Random(SEED)
    for _ in range(30):
        groups = tuple(GroupSpec(rng.choice([0, 1, 2, 4, 5, 8, 11])) for _ in range(rng.randint(1, 3)))
        length = rng.randint(1, 40)
        cache = make_cache(200, groups, caching=False)
        table, tokens, most = cache.open(), list(range(length)), 0
        for position in range(length):
            cache.grow(table, position + 1)
            most = max(most, table.num_held)
            cache.release(cache.commit(table, tokens, position + 1))
        assert most == cache.most_pages(length), (SEED, groups, length)


@pytest.mark.parametrize("num_tokens", [0, 3, 4, 7, 8, 10])
def test_a_fork_shares_full_pages_and_copies_the_last(num_tokens):
    cache, tokens = make_cache(16), list(range(11))
    table = cache.open()
    cache.grow(table, 11)
    twin, copies = cache.fork(table, num_tokens)
    full, partial = divmod(num_tokens, 4)
    assert twin.pages[0][:full] == table.pages[0][:full]
    assert twin.num_shared == full
    assert twin.num_entries == full + bool(partial)
    assert [source for source, _ in copies.pages] == ([table.pages[0][full]] if partial else [])
    assert [target for _, target in copies.pages] == twin.pages[0][full:]
    assert cache.num_held == 3 + bool(partial)
    cache.free(table, tokens)
    # The source of the copy stays until the copy is done.
    assert cache.num_held == full + 2 * bool(partial)
    cache.release([source for source, _ in copies.pages])
    cache.commit(twin, tokens, num_tokens)
    assert cache.num_cached_pages == full
    cache.free(twin, tokens)
    cache.check_idle()


def test_a_fork_of_a_table_that_slid_on_is_refused():
    cache, tokens = make_cache(32, (GroupSpec(), GroupSpec(6))), list(range(30))
    table = cache.open()
    cache.grow(table, 29)
    cache.release(cache.commit(table, tokens, 12))
    assert cache.can_fork(table, 12)
    twin, copies = cache.fork(table, 13)
    assert (twin.first_live, len(copies.pages)) == ([0, 2], 2)
    assert not cache.can_fork(table, 33)
    cache.release(cache.commit(table, tokens, 28))
    assert not cache.can_fork(table, 12)
    with pytest.raises(RuntimeError, match="cannot be forked at 12"):
        cache.fork(table, 12)


def test_shared_pages_are_settled_by_whoever_commits_first():
    cache, tokens = make_cache(16), list(range(9))
    table = cache.open()
    cache.grow(table, 9)
    twin, copies = cache.fork(table, 8)
    assert copies == CopyPlan([])
    cache.commit(twin, tokens, 8)
    cache.commit(table, tokens, 8)
    assert cache.num_cached_pages == 2
    for held in (table, twin):
        cache.free(held, tokens)
    cache.check_idle()


class Log:
    def __init__(self) -> None:
        self.keys: dict[tuple[bytes, int], tuple[bytes, tuple[int, ...]]] = {}

    def on_stored(self, key: bytes, parent: bytes, token_ids: list[int], group: int) -> None:
        assert (key, group) not in self.keys
        self.keys[key, group] = parent, tuple(token_ids)

    def on_removed(self, key: bytes, group: int) -> None:
        del self.keys[key, group]


def test_a_fork_that_ends_before_its_first_commit_leaves_what_others_have_keys_for():
    cache = make_cache()
    tokens = list(range(2 * cache.page_size))
    first, _ = run(cache, tokens)
    twin = cache.open()
    cache.grow(twin, len(tokens))
    forked, _ = cache.fork(twin, len(tokens))
    cache.commit(twin, tokens, len(tokens))
    for table in (forked, twin, first):
        cache.free(table, tokens)
    cache.check_idle()
    assert cache.num_cached_pages == 2
    assert cached_tokens(cache, [*tokens, 1]) == len(tokens)


def test_a_listener_can_mirror_the_cache():
    log = Log()
    cache = CacheManager(8, 4, ROOT, (GroupSpec(), GroupSpec(5)), listener=log)
    tokens = list(range(9))
    table, _ = run(cache, tokens)
    keys = table.hasher.keys
    assert log.keys == {
        (key, group): (parent, tuple(tokens[4 * index : 4 * index + 4]))
        for index, (key, parent) in enumerate(zip(keys, [ROOT, keys[0]], strict=True))
        for group in (0, 1)
    }
    cache.free(table, tokens)
    other = [*range(50, 60), 3, 3, 3]
    cache.free(run(cache, other)[0], other)
    assert len(log.keys) == cache.num_cached_pages < 10
    cache.reset()
    assert log.keys == {}


def test_misuse_raises():
    cache, tokens = make_cache(), list(range(9))
    table, _ = run(cache, tokens)
    with pytest.raises(RuntimeError, match="cannot start anew"):
        cache.take(table, cache.find(cache.open(), tokens))
    with pytest.raises(RuntimeError, match="16 tokens computed, 3 pages held"):
        cache.commit(table, list(range(16)), 16)
    assert len(cache.leaked()) == 3
    with pytest.raises(RuntimeError, match="leaked"):
        cache.check_idle()
    with pytest.raises(ConfigError, match="window"):
        GroupSpec(-1)


def test_a_chunk_may_end_anywhere():
    assert make_cache().next_boundary(3, 9) == 9
    assert make_cache().next_boundary(3, 2) == 3
