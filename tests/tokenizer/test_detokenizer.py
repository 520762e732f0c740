from __future__ import annotations

import random
import time

import pytest

from tests.seeds import SEED
from tokenspeed.tokenizer.detokenizer import (
    IncrementalDetokenizer,
    TokenBytes,
    byte_alphabet,
    byte_level_bytes,
    byte_token_bytes,
    spm_bytes,
)

HARD = "naïve 日本語 👩‍👩‍👧‍👦🏳️‍🌈 é\u0301 \u200d 🇫🇷 Ω\n\t  end"
SEEDS = [SEED + i for i in range(4)]


def table_of(pieces: list[bytes]) -> TokenBytes:
    return TokenBytes(lambda i: pieces[i], len(pieces))


def cut(rng: random.Random, items, longest: int):
    """Split into consecutive parts of 0 to `longest` items."""
    parts, at = [], 0
    while at < len(items):
        size = rng.randint(0, longest)
        parts.append(items[at : at + size])
        at += size
    return parts


def random_bytes(rng: random.Random, size: int) -> bytes:
    """Valid text with some bytes broken, dropped or repeated."""
    text = "".join(rng.choice(HARD) for _ in range(size)).encode()
    damaged = bytearray(text)
    for _ in range(rng.randint(0, size // 4)):
        damaged[rng.randrange(len(damaged))] = rng.randrange(256)
    return bytes(damaged)


@pytest.mark.parametrize("seed", SEEDS)
def test_pushes_join_to_the_whole_text_whatever_the_cuts(seed: int) -> None:
    rng = random.Random(seed)
    for size in (1, 2, 3, 7, 64, 301):
        data = random_bytes(rng, size)
        pieces = cut(rng, data, 5)
        table = table_of(pieces)
        expected = data.decode("utf-8", "replace")
        for longest in (1, 3, 40):
            detokenizer = IncrementalDetokenizer(table)
            got = "".join(detokenizer.push(ids) for ids in cut(rng, list(range(len(pieces))), longest))
            assert got + detokenizer.finish() == expected


@pytest.mark.parametrize("char", ["é", "語", "👧", "👩‍👧", "🏳️‍🌈"])
def test_no_push_splits_a_character(char: str) -> None:
    data = char.encode()
    detokenizer = IncrementalDetokenizer(table_of([bytes([b]) for b in range(256)]))
    pushed = [detokenizer.push([byte]) for byte in data]
    assert [text for text in pushed if text] == list(char)
    assert detokenizer.finish() == ""


def test_an_unfinished_character_is_held_and_then_replaced() -> None:
    detokenizer = IncrementalDetokenizer(table_of([b"a\xf0\x9f", b"\x98", b"b"]))
    assert detokenizer.push([0]) == "a"
    assert detokenizer.push([1]) == ""
    assert detokenizer.finish() == "\ufffd"
    broken = IncrementalDetokenizer(table_of([b"a\xf0\x9f", b"\x98", b"b"]))
    assert [broken.push([i]) for i in (0, 2)] == ["a", "\ufffdb"]


@pytest.mark.parametrize("split", [1, 2, 3])
def test_a_character_begun_in_the_prompt_is_completed(split: int) -> None:
    data = "xyz😀".encode()
    table = table_of([bytes([b]) for b in range(256)])
    prompt, rest = list(data[: 3 + split]), list(data[3 + split :])
    detokenizer = IncrementalDetokenizer(table, prompt_ids=prompt)
    assert "".join(detokenizer.push([i]) for i in rest) + detokenizer.finish() == "😀"


def test_the_dummy_prefix_is_dropped_only_at_the_start_of_the_text() -> None:
    table = table_of([b"", b" hello", b" world", b"<s>"])

    def text(ids: list[int], prompt: tuple[int, ...] = (), skip: frozenset[int] = frozenset({3})) -> str:
        detokenizer = IncrementalDetokenizer(table, skip, prompt, strip_leading_space=True)
        return "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish()

    assert text([1, 2]) == "hello world"
    assert text([0, 3, 1, 2]) == "hello world"
    assert text([1, 2], prompt=(3,)) == "hello world"
    assert text([1, 2], prompt=(2,)) == " hello world"
    assert text([3, 1], skip=frozenset()) == "<s> hello"


def test_ids_outside_the_vocabulary_have_no_text() -> None:
    detokenizer = IncrementalDetokenizer(table_of([b"a", b"b"]))
    assert detokenizer.push([-1, 0, 2, 1, 10**9]) == "ab"


def test_byte_alphabet_is_that_of_the_tokenizers_library() -> None:
    from tokenizers import decoders, pre_tokenizers

    assert set(byte_alphabet()) == set(pre_tokenizers.ByteLevel.alphabet())
    assert sorted(byte_alphabet().values()) == list(range(256))
    encoded = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(HARD)[0][0]
    assert byte_level_bytes(encoded).decode() == HARD == decoders.ByteLevel().decode([encoded])
    assert byte_level_bytes("<｜x｜>") == "<｜x｜>".encode()


def test_piece_bytes() -> None:
    assert spm_bytes("▁a▁▁b") == b" a  b"
    assert byte_token_bytes("<0x0A>") == b"\n"
    for piece in ("<0x0A", "<0xZZ>", "0x0A00", "<0x0AB>"):
        with pytest.raises(ValueError):
            byte_token_bytes(piece)


def test_cost_per_token_does_not_grow_with_the_text() -> None:
    detokenizer = IncrementalDetokenizer(table_of([" 語ab".encode(), b"\xf0\x9f", b"\x98\x80"]))
    start = time.perf_counter()
    for i in range(60_000):
        detokenizer.push([i % 3])
    assert (time.perf_counter() - start) / 60_000 < 20e-6  # about 1.5 us; a window that grows takes milliseconds
