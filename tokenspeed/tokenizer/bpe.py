"""Byte-level BPE from a GGUF's tokens and merges, through `tokenizers`, split as the model's own tokenizer splits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tokenspeed.contracts.errors import FormatError, UnsupportedError

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

_CONTRACTION = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _TAIL
_QWEN35 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _TAIL
_UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTION}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _TAIL
)
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
    + _TAIL,
)
_GGML_DEFAULT = (
    r"[\p{P}\$\+<=>\^~\|]+",
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
    r"\p{N}+",
    r"[0-9][0-9][0-9]",
)


@dataclass(frozen=True)
class PreTokenizer:
    """How a model's text is split before merging: patterns applied in order, each to the parts of the one before.

    nfc: the text is first brought to Unicode NFC. ignore_merges: a part that is a token is taken whole.
    add_bos: prepend bos where the file does not say.
    """

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3_STYLE = PreTokenizer((_LLAMA3,), ignore_merges=True, add_bos=True)
_GPT2_STYLE = PreTokenizer((_GPT2,))
_DIGITS_STYLE = PreTokenizer((r"\p{N}", _GPT2))
PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": PreTokenizer(_GGML_DEFAULT),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
    "dbrx": PreTokenizer((_LLAMA3,)),
    "glm4": PreTokenizer((_LLAMA3,)),
    "gpt-2": _GPT2_STYLE,
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "llama-bpe": _LLAMA3_STYLE,
    "llama-v3": _LLAMA3_STYLE,
    "llama3": _LLAMA3_STYLE,
    "llama4": PreTokenizer((_GPT4O,)),
    "olmo": _GPT2_STYLE,
    "phi-2": _GPT2_STYLE,
    "qwen2": PreTokenizer((_QWEN2,), nfc=True),
    "qwen35": PreTokenizer((_QWEN35,), nfc=True),
    "smollm": _DIGITS_STYLE,
    "starcoder": _DIGITS_STYLE,
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, add_bos=True),
}
"""By `tokenizer.ggml.pre`. The patterns are those of the models' published tokenizer.json; `default` is the one ggml
falls back to."""


def pre_tokenizer(name: str | None) -> PreTokenizer:
    """The entry of PRE_TOKENIZERS. Raises UnsupportedError, with the list, for another name or for none."""
    if name in PRE_TOKENIZERS:
        return PRE_TOKENIZERS[name]
    told = "names no pre-tokenizer (tokenizer.ggml.pre)" if name is None else f"names the pre-tokenizer {name!r}"
    raise UnsupportedError(f"the vocabulary {told}; supported: {', '.join(PRE_TOKENIZERS)}")


def build_bpe(
    tokens: Sequence[str], merges: Sequence[str], pre: PreTokenizer, control: Iterable[str], user_defined: Iterable[str]
) -> FastTokenizer:
    """A byte-level BPE tokenizer. merges: "left right", best first. Raises FormatError where they do not fit tokens."""
    from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

    vocab = {token: token_id for token_id, token in enumerate(tokens)}
    try:
        model = models.BPE(
            vocab=vocab,
            merges=[_merge_pair(merge) for merge in merges],
            ignore_merges=pre.ignore_merges,
        )
    except Exception as error:  # the library raises Exception itself
        raise FormatError(f"the vocabulary's tokens and merges do not fit together: {error}") from None
    tokenizer = Tokenizer(model)
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in control])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in user_defined])
    return tokenizer


def _merge_pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


class FastEncoder:
    """A tokenizer of the `tokenizers` library without its post-processor."""

    def __init__(self, tokenizer: FastTokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
