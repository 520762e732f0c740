"""A tokenizer with an id per byte, and one for each mark of harmony in place of some control characters."""

from __future__ import annotations

import re

from tokenspeed.parsing.harmony import MARKS
from tokenspeed.tokenizer.base import VocabularyTokenizer
from tokenspeed.tokenizer.detokenizer import TokenBytes

FIRST = 1
IDS = {mark: FIRST + number for number, mark in enumerate((*MARKS, "<|endoftext|>"))}
_TEXTS = {token: mark.encode() for mark, token in IDS.items()}
_MARK = re.compile("(" + "|".join(map(re.escape, IDS)) + ")")
VOCAB_SIZE = 256


class _Encoder:
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids: list[int] = []
        for piece in _MARK.split(text):
            ids += [IDS[piece]] if piece in IDS else piece.encode()
        return ids


def harmony_tokenizer() -> VocabularyTokenizer:
    return VocabularyTokenizer(
        encoder=_Encoder(),
        token_bytes=TokenBytes(lambda token: _TEXTS.get(token, bytes([token])), VOCAB_SIZE),
        vocab_size=VOCAB_SIZE,
        special_ids=frozenset(IDS.values()),
        strip_leading_space=False,
        bos_token_id=None,
        eos_token_ids=[IDS["<|return|>"]],
        chat_template="{{ messages }}",
        special_tokens={},
    )


def ids_of(text: str) -> list[int]:
    return harmony_tokenizer().encode(text)
