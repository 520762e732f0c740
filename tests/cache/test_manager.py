from __future__ import annotations

import pytest

from tokenspeed.cache.keys import root_key
from tokenspeed.cache.manager import BlockTable, CacheManager
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import SamplingParams

ROOT = root_key("model", "f32", 4)


def request_for(prompt: list[int], salt: str = "", prompt_logprobs: int | None = None) -> Request:
    params = SamplingParams(prompt_logprobs=prompt_logprobs)
    return Request(request_id="r", prompt_token_ids=prompt, params=params, seed=0, cache_salt=salt)


def make_cache(num_pages: int = 8, page_size: int = 4, caching: bool = True) -> CacheManager:
    return CacheManager(num_pages, page_size, ROOT, caching)


def run(cache: CacheManager, prompt: list[int], **options) -> tuple[BlockTable, int]:
    """Admit a prompt and compute all of it; returns its table and the tokens that were cached."""
    table = cache.open(request_for(prompt, **options), len(prompt))
    cached = cache.admit(table, prompt)
    assert cached is not None
    cache.grow(table, len(prompt))
    cache.commit(table, prompt, len(prompt))
    return table, cached


@pytest.mark.parametrize("length, cached", [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8), (11, 8)])
def test_a_hit_is_whole_pages_and_leaves_a_token_to_compute(length, cached):
    cache, tokens = make_cache(), list(range(11))
    first, _ = run(cache, tokens)
    second = cache.open(request_for(tokens[:length]), length)
    assert cache.match(second, tokens[:length]) == (first.pages[: cached // 4], cached)


def test_hits_are_counted_once_per_admission():
    cache, tokens = make_cache(), list(range(10))
    cache.free(run(cache, tokens)[0])
    table = cache.open(request_for(tokens), 10)
    for _ in range(3):
        cache.match(table, tokens)
    assert cache.admit(table, tokens) == 8
    stats = cache.stats
    assert (stats.queries, stats.queried_tokens, stats.hit_tokens) == (2, 20, 8)


def test_salts_and_diverging_tokens_do_not_share():
    cache, tokens = make_cache(16), list(range(9))
    run(cache, tokens, salt="a")
    assert run(cache, tokens, salt="b")[1] == 0
    assert run(cache, tokens, salt="a")[1] == 8
    assert run(cache, [*tokens[:6], 99, 7, 8], salt="a")[1] == 4


def test_prompt_logprobs_write_the_cache_and_do_not_read_it():
    cache, tokens = make_cache(16), list(range(9))
    assert run(cache, tokens, prompt_logprobs=0)[1] == 0
    assert run(cache, tokens, prompt_logprobs=2)[1] == 0
    assert run(cache, tokens)[1] == 8
    assert cache.stats.queries == 1


def test_without_caching_nothing_is_kept():
    cache, tokens = make_cache(caching=False), list(range(9))
    cache.free(run(cache, tokens)[0])
    assert run(cache, tokens)[1] == 0
    assert cache.num_cached_pages == 0


def test_only_computed_pages_enter():
    cache, tokens = make_cache(), list(range(12))
    table = cache.open(request_for(tokens), 12)
    cache.admit(table, tokens)
    cache.grow(table, 12)
    cache.commit(table, tokens, 7)
    assert cache.match(cache.open(request_for(tokens), 12), tokens)[1] == 4
    cache.free(table)
    assert (cache.num_cached_pages, cache.num_available) == (1, 8)
    cache.check_idle()


def test_grow_covers_exactly_the_positions_asked_for():
    cache, tokens = make_cache(), list(range(3))
    table = cache.open(request_for(tokens), 13)
    cache.admit(table, tokens)
    assert table.pages == []
    assert [len(cache.grow(table, n)) for n in (3, 4, 5, 5, 13)] == [1, 0, 1, 0, 2]
    with pytest.raises(RuntimeError, match="more than the 4 pages reserved"):
        cache.grow(table, 17)


def test_admission_reserves_the_longest_run():
    cache = make_cache(num_pages=8)
    first, second = (cache.open(request_for([i]), 17) for i in range(2))
    assert cache.admit(first, [0]) == 0
    assert cache.num_available == 3
    assert cache.admit(second, [1]) is None
    cache.grow(first, 6)
    assert cache.num_available == 3
    cache.free(first)
    assert cache.admit(second, [1]) == 0
    cache.free(second)
    cache.check_idle()


def test_a_held_hit_is_free_of_charge_and_an_idle_one_is_not():
    cache, tokens = make_cache(num_pages=4), list(range(12))
    holder, _ = run(cache, tokens)
    sharer = cache.open(request_for(tokens), 12)
    assert cache.admit(sharer, tokens) == 8
    assert cache.num_available == 0
    cache.free(holder)
    assert cache.num_available == 1
    cache.free(sharer)
    large = cache.open(request_for(tokens), 16)
    assert cache.admit(large, tokens) == 8
    assert cache.admit(cache.open(request_for([77]), 1), [77]) is None
    assert len(cache.grow(large, 16)) == 2


def test_a_refused_request_fits_once_another_has_computed_what_they_share():
    cache, tokens = make_cache(num_pages=4), list(range(12))
    first, second = (cache.open(request_for(tokens), 12) for _ in range(2))
    cache.admit(first, tokens)
    cache.grow(first, 12)
    assert cache.admit(second, tokens) is None
    cache.commit(first, tokens, 7)
    assert cache.admit(second, tokens) is None
    cache.commit(first, tokens, 12)
    assert cache.admit(second, tokens) == 8


def test_a_chain_is_evicted_from_its_tail():
    cache, tokens = make_cache(num_pages=4), list(range(13))
    cache.free(run(cache, tokens)[0])
    for expected in (8, 4, 0):
        filler = cache.open(request_for([50]), 16 - expected)
        cache.admit(filler, [50])
        cache.grow(filler, 16 - expected)
        assert cache.match(cache.open(request_for(tokens), 13), tokens)[1] == expected
        cache.free(filler)


def test_a_private_copy_takes_the_key_when_its_twin_was_dropped():
    cache, tokens = make_cache(num_pages=8), list(range(9))
    twin, _ = run(cache, tokens)
    private, _ = run(cache, tokens, prompt_logprobs=0)
    cache.free(twin)
    assert cache.reset_prefix_cache() == 2
    assert cache.match(cache.open(request_for(tokens), 9), tokens)[1] == 0
    cache.free(private)
    assert cache.match(cache.open(request_for(tokens), 9), tokens)[1] == 8
    cache.check_idle()


def test_misuse_raises():
    cache, tokens = make_cache(), list(range(9))
    table = cache.open(request_for(tokens), 9)
    with pytest.raises(RuntimeError, match="holds nothing"):
        cache.free(table)
    with pytest.raises(RuntimeError, match="reserved"):
        cache.grow(table, 1)
    cache.admit(table, tokens)
    with pytest.raises(RuntimeError, match="twice"):
        cache.admit(table, tokens)
    cache.grow(table, 4)
    with pytest.raises(RuntimeError, match="8 tokens computed, 1 pages held"):
        cache.commit(table, tokens, 8)
    assert len(cache.leaked()) == 1
    with pytest.raises(RuntimeError, match="leaked"):
        cache.check_idle()
