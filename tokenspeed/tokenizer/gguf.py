"""A tokenizer from the metadata of a GGUF file: SentencePiece ("llama") or byte-level BPE ("gpt2")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tokenspeed.config.generation import generation_from_gguf
from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.tokenizer.base import AffixEncoder, PlainEncoder, VocabularyTokenizer
from tokenspeed.tokenizer.bpe import FastEncoder, build_bpe, pre_tokenizer
from tokenspeed.tokenizer.detokenizer import TokenBytes, byte_level_bytes, byte_token_bytes, spm_bytes
from tokenspeed.tokenizer.spm import PieceType, SpmEncoder, SpmVocabulary, load_processor, model_proto

_PREFIX = "tokenizer.ggml."
_SUPPORTED = "llama (SentencePiece), gpt2 (byte-level BPE)"
_SPECIAL_TYPES = frozenset((PieceType.CONTROL, PieceType.UNKNOWN))
_NAMED_TOKENS = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> VocabularyTokenizer:
    """Build the tokenizer that `tokenizer.ggml.*` describes (keys: the GGUF specification in the ggml repository).

    Raises FormatError on missing or contradictory keys, UnsupportedError on another vocabulary or pre-tokenizer.
    """
    vocabulary = _Vocabulary(metadata)
    model = vocabulary.text("model")
    if model == "llama":
        return _spm_tokenizer(vocabulary)
    if model == "gpt2":
        return _bpe_tokenizer(vocabulary)
    raise UnsupportedError(f"{_PREFIX}model is {model!r}; supported: {_SUPPORTED}")


class _Vocabulary:
    """The checked reading of `tokenizer.ggml.*`."""

    def __init__(self, metadata: Mapping[str, Any]) -> None:
        self._metadata = metadata
        self.tokens: Sequence[str] = self._array("tokens", len(metadata.get(_PREFIX + "tokens", ())))
        if not self.tokens:
            raise FormatError(f"{_PREFIX}tokens is empty")
        chat_template = metadata.get("tokenizer.chat_template")
        self.chat_template = chat_template if isinstance(chat_template, str) else None

    def text(self, key: str) -> str:
        value = self._required(key)
        if not isinstance(value, str):
            raise FormatError(f"{_PREFIX}{key} must be a string, got {type(value).__name__}")
        return value

    def optional_text(self, key: str) -> str | None:
        return self.text(key) if _PREFIX + key in self._metadata else None

    def flag(self, key: str, default: bool) -> bool:
        return bool(self._metadata.get(_PREFIX + key, default))

    def per_token(self, key: str) -> Sequence[Any]:
        """An array with one entry per token."""
        return self._array(key, len(self.tokens))

    def merges(self) -> Sequence[str]:
        return self._required("merges")

    def token_id(self, key: str) -> int | None:
        value = self._metadata.get(_PREFIX + key)
        return None if value is None else self._checked(_PREFIX + key, value)

    def _checked(self, what: str, token_id: Any) -> int:
        if not isinstance(token_id, int) or not 0 <= token_id < len(self.tokens):
            raise FormatError(f"{what} is {token_id!r}, the vocabulary has {len(self.tokens)} tokens")
        return token_id

    def special_tokens(self) -> dict[str, str]:
        ids = {name: self.token_id(key) for name, key in _NAMED_TOKENS.items()}
        return {name: self.tokens[token_id] for name, token_id in ids.items() if token_id is not None}

    def end_ids(self) -> list[int]:
        ids = generation_from_gguf(self._metadata).eos_token_ids
        return [self._checked("an end of text", token_id) for token_id in ids]

    def affixes(self, add_bos_default: bool) -> dict[str, tuple[int, ...]]:
        return {
            "prefix_ids": self._added("add_bos_token", add_bos_default, "bos_token_id"),
            "suffix_ids": self._added("add_eos_token", False, "eos_token_id"),
        }

    def _added(self, flag: str, default: bool, key: str) -> tuple[int, ...]:
        token_id = self.token_id(key)
        if not self.flag(flag, default):
            return ()
        if token_id is not None:
            return (token_id,)
        if _PREFIX + flag in self._metadata:
            raise FormatError(f"{_PREFIX}{flag} is true, but {_PREFIX}{key} is missing")
        return ()

    def _required(self, key: str) -> Any:
        if _PREFIX + key not in self._metadata:
            raise FormatError(f"the file has no {_PREFIX}{key}")
        return self._metadata[_PREFIX + key]

    def _array(self, key: str, length: int) -> Sequence[Any]:
        values = self._required(key)
        if len(values) != length:
            raise FormatError(f"{_PREFIX}{key} has {len(values)} entries for {length} tokens")
        return values


@dataclass(frozen=True)
class _Kinds:
    """Token ids by kind: special ones have no text of their own, user-defined ones stand for themselves."""

    special: dict[str, int]
    user_defined: dict[str, int]
    byte: frozenset[int]

    @classmethod
    def of(cls, tokens: Sequence[str], types: Sequence[int]) -> _Kinds:
        odd = np.flatnonzero(np.asarray(types) != PieceType.NORMAL).tolist()
        return cls(
            {tokens[i]: i for i in odd if types[i] in _SPECIAL_TYPES},
            {tokens[i]: i for i in odd if types[i] == PieceType.USER_DEFINED},
            frozenset(i for i in odd if types[i] == PieceType.BYTE),
        )


def _spm_tokenizer(vocabulary: _Vocabulary) -> VocabularyTokenizer:
    tokens, types = vocabulary.tokens, vocabulary.per_token("token_type")
    kinds = _Kinds.of(tokens, types)
    unk_id = vocabulary.token_id("unknown_token_id") or 0
    add_space_prefix = vocabulary.flag("add_space_prefix", True)
    proto = model_proto(SpmVocabulary(tokens, vocabulary.per_token("scores"), types, unk_id, add_space_prefix))

    def render(token_id: int) -> bytes:
        piece = tokens[token_id]
        return byte_token_bytes(piece) if token_id in kinds.byte else spm_bytes(piece)

    encoder = SpmEncoder(load_processor(proto, _PREFIX + "tokens"), kinds.special)
    return _assemble(vocabulary, encoder, TokenBytes(render, len(tokens)), kinds, True, add_space_prefix)


def _bpe_tokenizer(vocabulary: _Vocabulary) -> VocabularyTokenizer:
    tokens = vocabulary.tokens
    kinds = _Kinds.of(tokens, vocabulary.per_token("token_type"))
    pre = pre_tokenizer(vocabulary.optional_text("pre"))
    encoder = FastEncoder(build_bpe(tokens, vocabulary.merges(), pre, kinds.special, kinds.user_defined))
    literal = frozenset(kinds.special.values()) | frozenset(kinds.user_defined.values())

    def render(token_id: int) -> bytes:
        return tokens[token_id].encode() if token_id in literal else byte_level_bytes(tokens[token_id])

    return _assemble(vocabulary, encoder, TokenBytes(render, len(tokens)), kinds, pre.add_bos, False)


def _assemble(
    vocabulary: _Vocabulary,
    encoder: PlainEncoder,
    token_bytes: TokenBytes,
    kinds: _Kinds,
    add_bos_default: bool,
    strip_leading_space: bool,
) -> VocabularyTokenizer:
    return VocabularyTokenizer(
        encoder=AffixEncoder(encoder, **vocabulary.affixes(add_bos_default)),
        token_bytes=token_bytes,
        vocab_size=len(vocabulary.tokens),
        special_ids=frozenset(kinds.special.values()),
        strip_leading_space=strip_leading_space,
        bos_token_id=vocabulary.token_id("bos_token_id"),
        eos_token_ids=vocabulary.end_ids(),
        chat_template=vocabulary.chat_template,
        special_tokens=vocabulary.special_tokens(),
    )
