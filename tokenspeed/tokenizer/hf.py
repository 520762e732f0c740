"""A tokenizer from a Hugging Face model directory: tokenizer.json, or tokenizer.model (SentencePiece) without it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.tokenizer.base import AffixEncoder, Encoder, VocabularyTokenizer
from tokenspeed.tokenizer.detokenizer import TokenBytes, byte_level_bytes, byte_token_bytes, spm_bytes
from tokenspeed.tokenizer.hub_files import HubFiles, read_hub_files
from tokenspeed.tokenizer.spm import SpmEncoder, has_dummy_prefix, load_processor

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

_SPM_DECODERS = frozenset(("Replace", "ByteFallback", "Fuse", "Strip", "Metaspace"))


def tokenizer_from_json(directory: Path) -> VocabularyTokenizer:
    """Load tokenizer.json; bos and eos in a prompt are its post-processor's business.

    Raises FormatError on a file the `tokenizers` library refuses, UnsupportedError on a decoder that is neither
    byte-level nor SentencePiece's.
    """
    from tokenizers import Tokenizer

    path = directory / "tokenizer.json"
    try:
        fast = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise FormatError(f"{path}: {error}") from None
    fast.no_truncation()
    fast.no_padding()
    decoder = _decoder(fast, path)
    added = fast.get_added_tokens_decoder()
    vocab_size = max(fast.get_vocab_size(), 1 + max(added, default=-1))

    def render(token_id: int) -> bytes:
        if token_id in added:
            return decoder.added(added[token_id].content)
        return decoder.piece(fast.id_to_token(token_id) or "")

    return _assemble(
        read_hub_files(directory),
        _PostProcessed(fast),
        TokenBytes(render, vocab_size),
        frozenset(token_id for token_id, token in added.items() if token.special),
        decoder.strip_leading_space,
        fast.token_to_id,
    )


def tokenizer_from_spm_file(directory: Path) -> VocabularyTokenizer:
    """Load tokenizer.model and the added tokens of tokenizer_config.json. Raises FormatError on a broken file."""
    path = directory / "tokenizer.model"
    proto = path.read_bytes()
    processor = load_processor(proto, str(path))
    files = read_hub_files(directory)
    size = processor.GetPieceSize()
    own = {processor.IdToPiece(i): i for i in range(size) if processor.IsControl(i) or processor.IsUnknown(i)}
    added = {text: token_id for token_id, (text, _) in files.added_tokens.items()}
    added_texts = {token_id: text for text, token_id in added.items() if token_id >= size}
    special = frozenset(own.values()) | {i for i, (_, is_special) in files.added_tokens.items() if is_special}
    vocab_size = max(size, 1 + max(added_texts, default=-1))

    def render(token_id: int) -> bytes:
        if token_id >= size:
            return added_texts.get(token_id, "").encode()
        piece = processor.IdToPiece(token_id)
        return byte_token_bytes(piece) if processor.IsByte(token_id) else spm_bytes(piece)

    bos, eos = processor.bos_id(), processor.eos_id()
    encoder = AffixEncoder(
        SpmEncoder(processor, own | added),
        (bos,) if bos >= 0 and files.add_bos is not False else (),
        (eos,) if eos >= 0 and files.add_eos else (),
    )
    ids = own | added
    strip = has_dummy_prefix(proto)
    return _assemble(files, encoder, TokenBytes(render, vocab_size), special, strip, ids.get)


def _assemble(
    files: HubFiles,
    encoder: Encoder,
    token_bytes: TokenBytes,
    special_ids: frozenset[int],
    strip_leading_space: bool,
    id_of: Callable[[str], int | None],
) -> VocabularyTokenizer:
    texts = files.special_tokens
    return VocabularyTokenizer(
        encoder=encoder,
        token_bytes=token_bytes,
        vocab_size=token_bytes.vocab_size,
        special_ids=special_ids,
        strip_leading_space=strip_leading_space,
        bos_token_id=id_of(texts["bos_token"]) if "bos_token" in texts else None,
        eos_token_ids=files.ids_of_ends(id_of(texts["eos_token"]) if "eos_token" in texts else None),
        chat_template=files.chat_template,
        special_tokens=texts,
    )


class _PostProcessed:
    """A tokenizer of the `tokenizers` library with its post-processor."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids)


@dataclass(frozen=True)
class _Decoder:
    """How a tokenizer.json turns pieces and added tokens into bytes."""

    piece: Callable[[str], bytes]
    added: Callable[[str], bytes]
    strip_leading_space: bool


def _decoder(fast: FastTokenizer, path: Path) -> _Decoder:
    stages = _decoder_stages(fast)
    kinds = {stage["type"] for stage in stages}
    if kinds == {"ByteLevel"}:
        return _Decoder(byte_level_bytes, str.encode, strip_leading_space=False)
    if kinds and kinds <= _SPM_DECODERS:
        piece = _spm_or_byte_bytes if "ByteFallback" in kinds else spm_bytes
        return _Decoder(piece, spm_bytes, any(_strips_space(stage) for stage in stages))
    found = ", ".join(sorted(kinds)) or "none"
    raise UnsupportedError(
        f"{path}: decoder {found}; supported: ByteLevel, or any of {', '.join(sorted(_SPM_DECODERS))}"
    )


def _decoder_stages(fast: FastTokenizer) -> list[dict[str, Any]]:
    if fast.decoder is None:
        return []
    state = json.loads(fast.decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _strips_space(stage: dict[str, Any]) -> bool:
    if stage["type"] == "Metaspace":
        return bool(stage.get("prepend_scheme", "always") != "never")
    return bool(stage["type"] == "Strip" and stage["content"] == " " and stage["start"] > 0)


def _spm_or_byte_bytes(piece: str) -> bytes:
    try:
        return byte_token_bytes(piece)
    except ValueError:
        return spm_bytes(piece)
