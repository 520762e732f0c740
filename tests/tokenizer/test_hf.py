from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, normalizers

from tests.seeds import SEED
from tests.tokenizer.bpe_models import HARD, LLAMA3, random_text, split_with, train
from tokenspeed.config.source import ModelSource
from tokenspeed.contracts.errors import ConfigError, FormatError, ModelNotFoundError, UnsupportedError
from tokenspeed.tokenizer.base import Tokenizer
from tokenspeed.tokenizer.load import load_tokenizer

SEEDS = [SEED + i for i in range(3)]


def write(directory: Path, **files: Any) -> ModelSource:
    for name, value in files.items():
        (directory / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return ModelSource(directory, "safetensors", "test")


def saved(directory: Path, fast: FastTokenizer, **files: Any) -> Tokenizer:
    fast.save(str(directory / "tokenizer.json"))
    return load_tokenizer(write(directory, **files))


@pytest.fixture(scope="module")
def byte_level() -> FastTokenizer:
    return train(split_with(LLAMA3), ignore_merges=True, bos=True)


@pytest.fixture(scope="module")
def spm_style() -> FastTokenizer:
    """BPE with byte fallback, a dummy prefix and the decoder that Llama 2's tokenizer.json has."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁helowrdn"]
    merges = [("▁", "h"), ("▁", "w"), ("l", "o"), ("l", "l"), ("e", "ll"), ("e", "l"), ("▁h", "ell"), ("▁hell", "o")]
    pieces += [left + right for left, right in merges]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    fast = FastTokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    fast.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.add_special_tokens(["<unk>", "<s>", "</s>"])
    return fast


@pytest.mark.parametrize("text", HARD)
def test_byte_level_is_the_library_itself(tmp_path: Path, byte_level: FastTokenizer, text: str) -> None:
    tokenizer = saved(tmp_path, byte_level)
    ids = byte_level.encode(text).ids
    assert tokenizer.encode(text) == ids
    assert ids[0] == byte_level.token_to_id("<|bos|>")
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids) == byte_level.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == byte_level.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("text", ["hello world", "  hello", "é 語👩‍👧 <s>hello</s> hello", "", " "])
def test_sentencepiece_style_is_the_library_itself(tmp_path: Path, spm_style: FastTokenizer, text: str) -> None:
    tokenizer = saved(tmp_path, spm_style)
    ids = spm_style.encode(text).ids
    assert tokenizer.encode(text) == ids
    assert tokenizer.decode(ids) == spm_style.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False) == spm_style.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", ["byte_level", "spm_style"])
def test_detokenizer_joins_to_the_library_decoding(
    tmp_path: Path, kind: str, seed: int, request: pytest.FixtureRequest
) -> None:
    fast: FastTokenizer = request.getfixturevalue(kind)
    tokenizer, rng = saved(tmp_path, fast), random.Random(seed)
    for size in (1, 11, 200):
        ids = fast.encode(random_text(rng, size)).ids
        detokenizer, text, at = tokenizer.detokenizer(), "", 0
        while at < len(ids):
            step = rng.randint(1, 4)
            text += detokenizer.push(ids[at : at + step])
            at += step
        assert text + detokenizer.finish() == fast.decode(ids)


def test_settings_come_from_the_files_beside_it(tmp_path: Path, byte_level: FastTokenizer) -> None:
    start, end = byte_level.token_to_id("<|im_start|>"), byte_level.token_to_id("<|im_end|>")
    tokenizer = saved(
        tmp_path,
        byte_level,
        tokenizer_config={
            "bos_token": {"content": "<|bos|>"},
            "eos_token": "<|im_end|>",
            "pad_token": None,
            "chat_template": [{"name": "tool_use", "template": "b"}, {"name": "default", "template": "a"}],
        },
        special_tokens_map={"unk_token": "<tool>", "eos_token": "ignored"},
        generation_config={"eos_token_id": [end, start]},
        config={"eos_token_id": 7},
    )
    assert tokenizer.bos_token_id == byte_level.token_to_id("<|bos|>")
    assert list(tokenizer.eos_token_ids) == [end, start]
    assert tokenizer.chat_template == "a"
    assert dict(tokenizer.special_tokens) == {"bos_token": "<|bos|>", "eos_token": "<|im_end|>", "unk_token": "<tool>"}
    (tmp_path / "chat_template.jinja").write_text("from file", encoding="utf-8")
    assert load_tokenizer(ModelSource(tmp_path, "safetensors", "x")).chat_template == "from file"


def test_eos_of_config_json_is_used_where_no_other_file_has_one(tmp_path: Path, byte_level: FastTokenizer) -> None:
    assert list(saved(tmp_path, byte_level, config={"eos_token_id": 7}).eos_token_ids) == [7]


def test_truncation_and_padding_of_the_file_are_off(tmp_path: Path) -> None:
    fast = train(split_with(LLAMA3))
    fast.enable_truncation(3)
    fast.enable_padding(length=50)
    tokenizer = saved(tmp_path, fast)
    assert tokenizer.decode(tokenizer.encode("one two three four five six")) == "one two three four five six"
    assert 3 < len(tokenizer.encode("one two three four five six")) != 50


def test_broken_and_missing_files(tmp_path: Path, byte_level: FastTokenizer) -> None:
    source = ModelSource(tmp_path, "safetensors", "x")
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json and tokenizer\.model"):
        load_tokenizer(source)
    with pytest.raises(ConfigError, match="metadata"):
        load_tokenizer(ModelSource(tmp_path / "m.gguf", "gguf", "x"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(FormatError, match=r"tokenizer\.json"):
        load_tokenizer(source)
    byte_level.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(FormatError, match=r"generation_config\.json.*list"):
        load_tokenizer(source)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": ["x"]}')
    with pytest.raises(FormatError, match="eos_token_id"):
        load_tokenizer(source)


@pytest.mark.parametrize("entries", [[1], {"x": {"content": "a"}}, {"1": {}}, {"1": "a"}])
def test_broken_added_tokens_are_refused(tmp_path: Path, byte_level: FastTokenizer, entries: Any) -> None:
    with pytest.raises(FormatError, match=r"tokenizer_config\.json: added_tokens_decoder"):
        saved(tmp_path, byte_level, tokenizer_config={"added_tokens_decoder": entries})


def test_a_template_file_must_be_utf8(tmp_path: Path, byte_level: FastTokenizer) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"ok\xff")
    with pytest.raises(FormatError, match=r"chat_template\.jinja: not UTF-8 at byte 2"):
        saved(tmp_path, byte_level)


def test_other_decoders_are_refused_by_name(tmp_path: Path) -> None:
    fast = FastTokenizer(models.WordPiece({"[UNK]": 0}, unk_token="[UNK]"))
    fast.decoder = decoders.WordPiece()
    with pytest.raises(UnsupportedError, match=r"WordPiece.*ByteLevel"):
        saved(tmp_path, fast)


def test_tokenizer_model_without_tokenizer_json(tmp_path: Path) -> None:
    words = ["hello world naïve tokens of light"] * 50
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    extra = {"300": {"content": "<|end|>", "special": True}, "1": {"content": "<s>", "special": True}}
    files = {"eos_token": "<|end|>", "bos_token": "<s>", "added_tokens_decoder": extra}
    tokenizer = load_tokenizer(write(tmp_path, tokenizer_config=files))
    for text in ("hello world", "naïve 日本 👧", "x  y"):
        ids = oracle.EncodeAsIds(text)
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == oracle.DecodeIds(ids)
    assert tokenizer.encode("hello<|end|>", add_special_tokens=False) == [*oracle.EncodeAsIds("hello"), 300]
    assert (tokenizer.vocab_size, tokenizer.bos_token_id, list(tokenizer.eos_token_ids)) == (301, 1, [300])
    assert tokenizer.decode([300]) == ""
    assert tokenizer.decode([300], skip_special_tokens=False) == "<|end|>"
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\xff\xff broken")
    with pytest.raises(FormatError, match=r"tokenizer\.model"):
        load_tokenizer(ModelSource(tmp_path, "safetensors", "x"))
