from __future__ import annotations

import struct
from hashlib import blake2b

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.cache.keys import ChainHasher, root_key

ROOT = root_key("model", "bf16", 4)


def keys_of(tokens: list[int], page_size: int = 4, extra: bytes = b"", root: bytes = ROOT) -> list[bytes]:
    hasher = ChainHasher(root, page_size, extra)
    hasher.extend(tokens, len(tokens) // page_size)
    return hasher.keys


def test_keys_follow_the_documented_formula():
    tokens = [1, 2, 3, 2**31 - 1, 5, 6, 7, 8]
    first = blake2b(ROOT + struct.pack("<4i", *tokens[:4]) + b"salt", digest_size=16).digest()
    second = blake2b(first + struct.pack("<4i", *tokens[4:]) + b"salt", digest_size=16).digest()
    assert keys_of(tokens, extra=b"salt") == [first, second]


def test_keys_are_the_same_in_every_process_and_version():
    """A change here makes stored and remote caches unreadable: bump the tag in root_key with it."""
    assert root_key("model", "bf16", 4).hex() == "83b00ea66b1df0f0dcc075915ee37256"
    assert [key.hex() for key in keys_of([1, 2, 3, 4, 5, 6, 7, 8, 9])] == [
        "45a8b4810e1d4593c1374ecc9fd58ed1",
        "9c4afac0fb2e6cf928b67aa96cf3a9b4",
    ]


def test_root_separates_model_dtype_page_size_and_field_borders():
    roots = {
        root_key(*args)
        for args in [("m", "bf16", 4), ("m2", "bf16", 4), ("m", "fp8", 4), ("m", "bf16", 16), ("mb", "f16", 4)]
    }
    assert len(roots) == 5
    assert all(len(root) == 16 for root in roots)


@settings(deadline=None, database=None)
@given(
    tokens=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=70),
    page_size=st.sampled_from([1, 3, 4, 16]),
    data=st.data(),
)
def test_extending_in_pieces_equals_hashing_once_and_any_change_shows(tokens, page_size, data):
    whole = keys_of(tokens, page_size)
    pieces = ChainHasher(ROOT, page_size)
    for num_pages in [*sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=4))), len(whole)]:
        pieces.extend(tokens, num_pages)
        assert pieces.keys == whole[:num_pages]
    index = data.draw(st.integers(0, len(tokens) - 1))
    changed = tokens.copy()
    changed[index] ^= 1
    first_changed = index // page_size
    assert keys_of(changed, page_size)[:first_changed] == whole[:first_changed]
    assert not set(keys_of(changed, page_size)[first_changed:]) & set(whole)
    assert not set(keys_of(tokens, page_size, extra=b"x")) & set(whole)


def test_pages_that_are_not_full_are_refused():
    with pytest.raises(RuntimeError, match="2 pages need 8 tokens, the sequence has 7"):
        ChainHasher(ROOT, 4).extend([0] * 7, 2)


def test_a_copy_goes_its_own_way():
    hasher = ChainHasher(ROOT, 4)
    hasher.extend(list(range(12)), 3)
    twin = hasher.copy(2)
    twin.extend([*range(8), 99, 99, 99, 99], 3)
    assert twin.keys == keys_of([*range(8), 99, 99, 99, 99])
    assert hasher.keys == keys_of(list(range(12)))
