"""What the engine and the server know of a tokenizer, and the one class behind every vocabulary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tokenspeed.contracts.errors import PromptError
from tokenspeed.tokenizer.detokenizer import IncrementalDetokenizer, TokenBytes


class Tokenizer(Protocol):
    """Text to ids and back."""

    @property
    def vocab_size(self) -> int:
        """One past the largest id that has text; a model may have more rows."""
        ...

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_ids(self) -> Sequence[int]:
        """Every id that ends a generation: the end of the text, and of a turn where the model names one."""
        ...

    @property
    def chat_template(self) -> str | None:
        """The model's own Jinja template."""
        ...

    @property
    def special_tokens(self) -> Mapping[str, str]:
        """Texts that a chat template may name: `bos_token`, `eos_token` and the like."""
        ...

    @property
    def token_bytes(self) -> Mapping[int, bytes]:
        """The bytes of each id; they may be a part of a character."""
        ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of a text; special tokens written in it are recognised. `add_special_tokens` adds the bos or eos the
        model was trained with. Raises PromptError on text that is not valid Unicode."""
        ...

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of ids; bytes that are no UTF-8 become U+FFFD, ids outside the vocabulary nothing."""
        ...

    def token_text(self, token_id: int) -> str:
        """Text of one id alone, special tokens included."""
        ...

    def detokenizer(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        """A fresh detokenizer for ids that follow `prompt_ids`."""
        ...


class Encoder(Protocol):
    """The half of a tokenizer that libraries do."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        """Ids of a text, special tokens in it recognised."""
        ...


@dataclass(frozen=True, kw_only=True)
class VocabularyTokenizer:
    """An encoder and a table of token bytes. `special_ids` are left out of text unless asked for."""

    encoder: Encoder
    token_bytes: TokenBytes
    vocab_size: int
    special_ids: frozenset[int]
    strip_leading_space: bool
    bos_token_id: int | None
    eos_token_ids: Sequence[int]
    chat_template: str | None
    special_tokens: Mapping[str, str]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        try:
            text.encode()  # sentencepiece and tokenizers each fail in their own way on what has no UTF-8
        except UnicodeEncodeError as error:
            raise PromptError(f"the prompt is not valid Unicode: lone surrogate at character {error.start}") from None
        return self.encoder.encode(text, add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        detokenizer = self.detokenizer((), skip_special_tokens)
        return detokenizer.push(ids) + detokenizer.finish()

    def token_text(self, token_id: int) -> str:
        return self.token_bytes[token_id].decode("utf-8", "replace")

    def detokenizer(self, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True) -> IncrementalDetokenizer:
        skip = self.special_ids if skip_special_tokens else frozenset[int]()
        return IncrementalDetokenizer(self.token_bytes, skip, prompt_ids, self.strip_leading_space)


@dataclass(frozen=True)
class AffixEncoder:
    """An encoder without a notion of bos and eos, and the ids to put around its result."""

    inner: PlainEncoder
    prefix_ids: tuple[int, ...] = ()
    suffix_ids: tuple[int, ...] = ()

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self.inner.encode(text)
        return [*self.prefix_ids, *ids, *self.suffix_ids] if add_special_tokens else ids


class PlainEncoder(Protocol):
    """Text to ids, nothing added."""

    def encode(self, text: str) -> list[int]:
        """Ids of a text, special tokens in it recognised."""
        ...
