from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import pre_tokenizers

from tests.seeds import SEED
from tests.tokenizer.bpe_models import CONTROL, HARD, LLAMA3, QWEN2, gguf_metadata, random_text, split_with, train
from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.tokenizer.bpe import PRE_TOKENIZERS, build_bpe
from tokenspeed.tokenizer.gguf import tokenizer_from_gguf

SEEDS = [SEED + i for i in range(3)]
KINDS = ["llama-bpe", "qwen2", "deepseek-r1-qwen", "gpt-2", "smollm"]


@cache
def original(pre: str) -> FastTokenizer:
    """The tokenizer as its publisher would build it."""
    if pre == "llama-bpe":
        return train(split_with(LLAMA3), ignore_merges=True)
    if pre == "qwen2":
        return train(split_with(QWEN2), nfc=True)
    if pre == "deepseek-r1-qwen":
        return train(split_with(QWEN2))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if pre == "gpt-2":
        return train(byte_level)
    return train(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level]))


@pytest.mark.parametrize("pre", KINDS)
@pytest.mark.parametrize("text", HARD)
def test_ids_are_those_of_the_original(pre: str, text: str) -> None:
    fast = original(pre)
    tokenizer = tokenizer_from_gguf(gguf_metadata(fast, pre))
    ids = fast.encode(text).ids
    assert tokenizer.encode(text, add_special_tokens=False) == ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == fast.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == fast.decode(ids)


@pytest.mark.parametrize("pre", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_random_text_and_random_ids(pre: str, seed: int) -> None:
    rng = random.Random(seed)
    fast = original(pre)
    tokenizer = tokenizer_from_gguf(gguf_metadata(fast, pre))
    for size in (1, 13, 257):
        text = random_text(rng, size)
        assert tokenizer.encode(text, add_special_tokens=False) == fast.encode(text).ids
        ids = [rng.randrange(tokenizer.vocab_size) for _ in range(size)]
        detokenizer = tokenizer.detokenizer()
        pushed = "".join(detokenizer.push([i]) for i in ids) + detokenizer.finish()
        assert pushed == tokenizer.decode(ids) == fast.decode(ids)


CODE = "HTMLParser's x1234 a/b//\n"


@pytest.mark.parametrize(
    "pre, text, parts",
    [
        ("gpt-4o", CODE, ["HTMLParser's", " x", "123", "4", " a", "/b", "//\n"]),
        ("tekken", CODE, ["HTMLParser", "'s", " x", "1", "2", "3", "4", " a", "/b", "//\n"]),
        ("llama-bpe", CODE, ["HTMLParser", "'s", " x", "123", "4", " a", "/b", "//\n"]),
        ("gpt-2", CODE, ["HTMLParser", "'s", " x", "1234", " a", "/", "b", "//", "\n"]),
        ("smollm", CODE, ["HTMLParser", "'s", " x", "1", "2", "3", "4", " a", "/", "b", "//", "\n"]),
        ("gpt-4o", "camelCase DON'T", ["camel", "Case", " DON'T"]),
        ("tekken", "camelCase DON'T", ["camel", "Case", " DON", "'T"]),
        (
            "deepseek-v3",
            "中1文x 12345 a,b (c)\n",
            ["中", "1", "文", "x", " ", "123", "45", " a", ",b", " (", "c", ")\n"],
        ),
        ("glm4", "中1文x don'T", ["中", "1", "文x", " don", "'T"]),
        ("qwen2", "e\u0301x 12", ["e", "\u0301x", " ", "1", "2"]),
        ("qwen35", "e\u0301x 12", ["e\u0301x", " ", "1", "2"]),
        ("default", "a$b 1234", ["a", "$", "b", " ", "123", "4"]),
    ],
)
def test_texts_are_split_as_the_published_patterns_say(pre: str, text: str, parts: list[str]) -> None:
    fast = build_bpe(["a"], [], PRE_TOKENIZERS[pre], [], [])
    found = [text[start:end] for _, (start, end) in fast.pre_tokenizer.pre_tokenize_str(text)]
    assert found == parts


def test_a_part_that_is_a_token_is_taken_whole_where_the_model_does_so() -> None:
    def ids(pre: str) -> list[int]:
        return build_bpe(["a", "b", "ab"], [], PRE_TOKENIZERS[pre], [], []).encode("ab").ids

    assert ids("llama-bpe") == ids("tekken") == [2]
    assert ids("qwen2") == [0, 1]


@pytest.mark.parametrize("pre", sorted(PRE_TOKENIZERS))
def test_every_pre_tokenizer_keeps_the_text(pre: str) -> None:
    tokenizer = tokenizer_from_gguf(gguf_metadata(original("gpt-2"), pre))
    for text in HARD:
        if not PRE_TOKENIZERS[pre].nfc or "\u0301" not in text:
            assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False).removeprefix("<|bos|>") == text


def test_bos_is_added_where_the_pre_tokenizer_or_the_file_says_so() -> None:
    fast = original("llama-bpe")
    bos = fast.token_to_id("<|bos|>")
    plain = fast.encode("hi").ids
    assert tokenizer_from_gguf(gguf_metadata(fast, "llama-bpe")).encode("hi") == [bos, *plain]
    assert tokenizer_from_gguf(gguf_metadata(fast, "llama-bpe", add_bos_token=False)).encode("hi") == plain
    assert tokenizer_from_gguf(gguf_metadata(fast, "gpt-2")).encode("x") == original("gpt-2").encode("x").ids
    assert tokenizer_from_gguf(gguf_metadata(fast, "qwen2", add_bos_token=True)).encode("hi")[0] == bos


def test_special_tokens_and_template() -> None:
    fast = original("qwen2")
    tokenizer = tokenizer_from_gguf(gguf_metadata(fast, "qwen2") | {"tokenizer.chat_template": "{{ messages }}"})
    ends = [fast.token_to_id("<|im_end|>")]
    assert (tokenizer.bos_token_id, list(tokenizer.eos_token_ids)) == (fast.token_to_id("<|bos|>"), ends)
    assert dict(tokenizer.special_tokens) == {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}
    assert tokenizer.chat_template == "{{ messages }}"
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in (*CONTROL, "<tool>")]
    assert [len(found) for found in ids] == [1, 1, 1, 1]
    assert tokenizer.decode([token_id for found in ids for token_id in found]) == "<tool>"
    assert tokenizer.token_text(ids[1][0]) == "<|im_start|>"


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"pre": "martian"}, UnsupportedError, "'martian'.*llama-bpe"),
        ({"pre": None}, UnsupportedError, "names no pre-tokenizer.*qwen2"),
        ({"merges": None}, FormatError, "no tokenizer.ggml.merges"),
        ({"merges": ["not there"]}, FormatError, "do not fit"),
        ({"merges": ["nospace"]}, FormatError, "do not fit"),
        ({"token_type": [1]}, FormatError, "token_type has 1 entries"),
    ],
)
def test_broken_vocabularies_are_refused(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tokenizer_from_gguf(gguf_metadata(original("gpt-2"), **({"pre": "gpt-2"} | changes)))


@pytest.mark.parametrize("kind", [3, 4])
def test_tokens_that_are_not_merged_stand_for_themselves(kind: int) -> None:
    """é is itself a letter of the byte alphabet, where it means the byte E9."""
    metadata = gguf_metadata(original("gpt-2"), "gpt-2")
    new = len(metadata["tokenizer.ggml.tokens"])
    metadata["tokenizer.ggml.tokens"] = [*metadata["tokenizer.ggml.tokens"], "<é>"]
    metadata["tokenizer.ggml.token_type"] = [*metadata["tokenizer.ggml.token_type"], kind]
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.encode("<é>") == [new]
    assert tokenizer.decode([new], skip_special_tokens=False) == tokenizer.token_text(new) == "<é>"
    assert tokenizer.decode([new]) == ("" if kind == 3 else "<é>")
