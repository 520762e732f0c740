"""Token ids to text: the bytes of each token, joined and decoded as UTF-8, at once or as they come."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Collection, Sequence
from functools import cache

SPM_SPACE = "\u2581"
"""SentencePiece writes a space as this character (LOWER ONE EIGHTH BLOCK)."""
_LONGEST_PARTIAL = 3
"""Most bytes an incomplete UTF-8 character can have."""


class TokenBytes(dict[int, bytes]):
    """The bytes each id stands for, rendered on first use; ids outside the vocabulary stand for none."""

    def __init__(self, render: Callable[[int], bytes], vocab_size: int) -> None:
        super().__init__()
        self._render = render
        self.vocab_size = vocab_size
        self.texts = _Texts(self)

    def __missing__(self, token_id: int) -> bytes:
        data = self._render(token_id) if 0 <= token_id < self.vocab_size else b""
        self[token_id] = data
        return data


class _Texts(dict[int, str | None]):
    """The text of each id whose bytes are whole characters, None for the others."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        super().__init__()
        self._bytes = token_bytes

    def __missing__(self, token_id: int) -> str | None:
        try:
            text: str | None = self._bytes[token_id].decode()
        except UnicodeDecodeError:
            text = None
        self[token_id] = text
        return text


def spm_bytes(piece: str) -> bytes:
    """The bytes of a SentencePiece piece that is no byte token."""
    return piece.replace(SPM_SPACE, " ").encode()


def byte_token_bytes(piece: str) -> bytes:
    """The byte of a byte-fallback token such as `<0x0A>`. Raises ValueError on any other piece."""
    if len(piece) != 6 or not piece.startswith("<0x") or piece[5] != ">":
        raise ValueError(f"not a byte token: {piece!r}")
    return bytes.fromhex(piece[3:5])


def byte_level_bytes(piece: str) -> bytes:
    """The bytes of a byte-level BPE piece; a piece with a character outside the byte alphabet stands for itself."""
    alphabet = byte_alphabet()
    try:
        return bytes([alphabet[char] for char in piece])
    except KeyError:
        return piece.encode()


@cache
def byte_alphabet() -> dict[str, int]:
    """GPT-2's alphabet: printable Latin-1 bytes are themselves, the other 68 are U+0100 and on, in byte order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


class IncrementalDetokenizer:
    """Turns ids into text as they come, holding back an unfinished UTF-8 character.

    The pushes and `finish`, joined, do not depend on how the ids were cut into pushes.
    skip_ids: ids without text. prompt_ids: what came before; only its last bytes are looked at, so that a character
    begun in the prompt can be completed. strip_leading_space: drop one space at the very start of the text, which
    SentencePiece's dummy prefix put there.
    """

    __slots__ = ("_bytes", "_partial", "_skip", "_strip", "_texts")

    def __init__(
        self,
        token_bytes: TokenBytes,
        skip_ids: Collection[int] = (),
        prompt_ids: Sequence[int] = (),
        strip_leading_space: bool = False,
    ) -> None:
        self._bytes = token_bytes
        self._skip = skip_ids
        self._texts = token_bytes.texts
        self._partial = b""
        """The begin of a character."""
        tail = self._prompt_tail(prompt_ids)
        self._decode(tail)
        self._strip = strip_leading_space and not tail

    def push(self, ids: Sequence[int]) -> str:
        """The text that these ids complete; invalid bytes become U+FFFD."""
        table, skip = self._bytes, self._skip
        if len(ids) == 1 and not (self._partial or self._strip):
            (token_id,) = ids
            text = self._texts[token_id]
            if text is not None:
                return "" if token_id in skip else text
        data = b"".join([table[i] for i in ids if i not in skip])
        if self._strip and data:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._decode(data)

    def finish(self) -> str:
        """What is still held, as U+FFFD; the detokenizer is spent after this."""
        return self._decode(b"", final=True)

    def _decode(self, data: bytes, final: bool = False) -> str:
        data = self._partial + data
        text, used = codecs.utf_8_decode(data, "replace", final)
        self._partial = data[used:]
        return text

    def _prompt_tail(self, prompt_ids: Sequence[int]) -> bytes:
        tail = b""
        for token_id in reversed(prompt_ids):
            if token_id not in self._skip:
                tail = self._bytes[token_id] + tail
                if len(tail) >= _LONGEST_PARTIAL:
                    break
        return tail
