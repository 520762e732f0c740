"""Tiny byte-level BPE tokenizers trained here, and what a GGUF file would say of them."""

from __future__ import annotations

import random
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
HARD = [
    "I'm HERE'S we'LL they'd don't 'tis o'clock",
    "1234567890 3.14159 v2.0 ٣٤٥ Ⅷ 1st",
    "  two   spaces\t\ttabs \n\n\r\n  newline  ",
    "naïve e\u0301 Ω日本語テキスト 한국어 नमस्ते",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \u200d\u0378\x00",
    "def f(x):\n    return x**2 # done!!!\n",
    "<|im_start|>user\nhi<|im_end|>\n<tool> x<tool>y",
    "",
    " ",
    "\n",
]
CONTROL = ["<|bos|>", "<|im_start|>", "<|im_end|>"]
USER_DEFINED = ["<tool>"]


def random_text(rng: random.Random, size: int) -> str:
    words = [*"aeiost '\n\t.,!0123", "the", "ing", "é", "語", "👧", "\u200d", "  ", "'ll", "'S", "<tool>", "<|im_end|>"]
    return "".join(rng.choice(words) for _ in range(size))


def split_with(*patterns: str) -> Any:
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(pre_tokenizer: Any, nfc: bool = False, ignore_merges: bool = False, bos: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    if nfc:
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    rng = random.Random(11)
    tokenizer.train_from_iterator([*HARD, *(random_text(rng, 60) for _ in range(200))] * 2, trainer)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in CONTROL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in USER_DEFINED])
    if bos:
        bos_id = tokenizer.token_to_id("<|bos|>")
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", bos_id)]
        )
    return tokenizer


def gguf_metadata(tokenizer: Tokenizer, pre: str | None, **changes: Any) -> dict[str, Any]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    fields = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if t in CONTROL else 4 if t in USER_DEFINED else 1 for t in tokens],
        "merges": [" ".join(pair) for pair in merges],
        "bos_token_id": tokenizer.token_to_id("<|bos|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
    } | changes
    return {f"tokenizer.ggml.{key}": value for key, value in fields.items() if value is not None}
