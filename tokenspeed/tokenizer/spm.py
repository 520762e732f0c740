"""SentencePiece vocabularies: a model built from pieces, and special tokens recognised in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from tokenspeed.contracts.errors import FormatError
from tokenspeed.tokenizer.detokenizer import SPM_SPACE


class PieceType(IntEnum):
    """Kinds of a piece, as sentencepiece_model.proto and `tokenizer.ggml.token_type` number them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class SpmVocabulary:
    """Pieces, scores and types by id, and how a text is prepared for them."""

    pieces: Sequence[str]
    scores: Sequence[float]
    types: Sequence[int]
    unk_id: int
    add_dummy_prefix: bool


def model_proto(vocabulary: SpmVocabulary) -> bytes:
    """A serialized ModelProto (BPE, byte fallback, no normalisation) for `load_processor`."""
    trainer = (
        _number(_MODEL_TYPE, _BPE)
        + _number(_VOCAB_SIZE, len(vocabulary.pieces))
        + _number(_BYTE_FALLBACK, PieceType.BYTE in vocabulary.types)
        + _number(_UNK_ID, vocabulary.unk_id)
    )
    normalizer = (
        _text(_NORMALIZER_NAME, b"identity")
        + _number(_ADD_DUMMY_PREFIX, vocabulary.add_dummy_prefix)
        + _number(_REMOVE_EXTRA_WHITESPACES, False)
    )
    return _serialized_pieces(vocabulary) + _text(_TRAINER_SPEC, trainer) + _text(_NORMALIZER_SPEC, normalizer)


# Numbers of fields, and of the enum's value, in sentencepiece_model.proto.
_TRAINER_SPEC, _NORMALIZER_SPEC = 2, 3
_MODEL_TYPE, _VOCAB_SIZE, _BYTE_FALLBACK, _UNK_ID = 3, 4, 35, 40
_NORMALIZER_NAME, _ADD_DUMMY_PREFIX, _REMOVE_EXTRA_WHITESPACES = 1, 3, 4
_BPE = 2


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value)


def _text(field: int, value: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    return bytes([value & 0x7F | (0x80 if value > 0x7F else 0)]) + (_varint(value >> 7) if value > 0x7F else b"")


# One entry of ModelProto.pieces, as sentencepiece_model.proto numbers its fields, up to the text of the piece. A length
# is a varint of four bytes, which protobuf allows to be longer than it need be: so every entry has the same shape.
_ENTRY = np.dtype(
    [
        ("pieces", "u1"),
        ("size", "4u1"),
        ("score_tag", "u1"),
        ("score", "<f4"),
        ("type_tag", "u1"),
        ("type", "u1"),
        ("piece_tag", "u1"),
        ("length", "4u1"),
    ]
)
_MAX_PIECE = 1 << 27
"""Bytes."""


def _serialized_pieces(vocabulary: SpmVocabulary) -> bytes:
    """ModelProto.pieces, put together in bulk: as message objects, 262,144 pieces take 0.2 s and 40 MB."""
    text, lengths = _joined(vocabulary.pieces)
    if lengths.max(initial=0) > _MAX_PIECE:
        raise FormatError(f"a piece of {lengths.max()} bytes is in the vocabulary (limit {_MAX_PIECE})")
    types = np.asarray(vocabulary.types)
    known = (types >= min(PieceType)) & (types <= max(PieceType))
    if not known.all():
        raise FormatError(f"a piece's type is {types[~known][0]} (known: 1 to 6)")
    heads = np.empty(lengths.size, _ENTRY)
    heads["pieces"], heads["score_tag"], heads["type_tag"], heads["piece_tag"] = 0x0A, 0x15, 0x18, 0x0A
    heads["size"] = _varints(lengths + _ENTRY.itemsize - 5)
    heads["score"], heads["type"], heads["length"] = vocabulary.scores, types, _varints(lengths)
    heads["type"][vocabulary.unk_id] = PieceType.UNKNOWN
    out = np.empty(text.size + heads.nbytes, np.uint8)
    runs = np.stack([np.full_like(lengths, _ENTRY.itemsize), lengths], axis=1).reshape(-1)
    is_text = np.repeat(np.arange(runs.size) % 2 == 1, runs)
    out[is_text] = text
    out[~is_text] = heads.view(np.uint8)
    return out.tobytes()


def _joined(pieces: Sequence[str]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """UTF-8 of all pieces, one after the other and with spaces as sentencepiece writes them, and the bytes of each."""
    raw = np.frombuffer("\0".join(pieces).replace(" ", SPM_SPACE).encode(), np.uint8)
    ends = np.append(np.flatnonzero(raw == 0), raw.size)
    if ends.size == len(pieces):
        return raw[raw != 0], np.diff(ends, prepend=-1) - 1
    texts = [piece.replace(" ", SPM_SPACE).encode() for piece in pieces]  # some hold a NUL of their own
    return np.frombuffer(b"".join(texts), np.uint8), np.fromiter(map(len, texts), np.int64, len(texts))


def _varints(values: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    """Protobuf varints of four bytes each: [len(values), 4]."""
    groups = values[:, None] >> np.array([0, 7, 14, 21]) & 0x7F
    return (groups | np.array([0x80, 0x80, 0x80, 0])).astype(np.uint8)


def has_dummy_prefix(proto: bytes) -> bool:
    """Whether a serialized ModelProto puts a space before every text."""
    return bool(_schema().ModelProto.FromString(proto).normalizer_spec.add_dummy_prefix)


def _schema() -> Any:
    from sentencepiece import sentencepiece_model_pb2

    return sentencepiece_model_pb2


def load_processor(proto: bytes, source: str) -> Any:
    """A SentencePieceProcessor. Raises FormatError, naming `source`, where sentencepiece refuses the model."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.LoadFromSerializedProto(proto)
    except (RuntimeError, OSError) as error:
        raise FormatError(f"{source}: sentencepiece cannot load this vocabulary: {error}") from None
    return processor


class SpmEncoder:
    """Splits special tokens out of the text and gives the rest to sentencepiece, each part as a text of its own."""

    def __init__(self, processor: Any, special_ids: Mapping[str, int]) -> None:
        self._processor = processor
        self._splitter = SpecialSplitter(special_ids)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for part in self._splitter.split(text):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids.extend(self._processor.EncodeAsIds(part))
        return ids


class SpecialSplitter:
    """Finds special tokens in a text, the longest first. Thousands of them cost no more than a few."""

    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._ids = {text: token_id for text, token_id in special_ids.items() if text}
        lengths: dict[str, set[int]] = {}
        for text in self._ids:
            lengths.setdefault(text[0], set()).add(len(text))
        self._lengths = {char: sorted(found, reverse=True) for char, found in lengths.items()}
        # An empty class matches nowhere: (?!) stands for it.
        self._first_char = re.compile(f"[{''.join(map(re.escape, lengths))}]" if lengths else "(?!)")

    def split(self, text: str) -> Iterator[str | int]:
        """The text in order: plain parts (never empty) as str, special tokens as ids."""
        start = 0
        for match in self._first_char.finditer(text):
            at = match.start()
            token = self._token_at(text, at) if at >= start else None
            if token is None:
                continue
            if at > start:
                yield text[start:at]
            yield self._ids[token]
            start = at + len(token)
        if start < len(text):
            yield text[start:]

    def _token_at(self, text: str, at: int) -> str | None:
        for length in self._lengths[text[at]]:
            token = text[at : at + length]
            if token in self._ids:
                return token
        return None
