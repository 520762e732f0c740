"""Log-probabilities in the two shapes of OpenAI's API."""

from __future__ import annotations

from collections.abc import Sequence

from tokenspeed.engine.output import TokenAlternatives
from tokenspeed.server.openai.responses import ChatLogprobs, CompletionLogprobs, TokenLogprob, TopLogprob
from tokenspeed.tokenizer.base import Tokenizer


def completion_logprobs(
    token_ids: Sequence[int],
    alternatives: Sequence[TokenAlternatives | None],
    offset: int,
    tokenizer: Tokenizer | None,
) -> CompletionLogprobs:
    """One entry per token, and its alternatives by text. Texts are empty without a tokenizer.

    alternatives: None for the first token of a prompt. offset: characters of the choice's text before the first token.
    Alternatives of the same text (parts of characters) share one entry, the likeliest.
    """
    found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    for token_id, entries in zip(token_ids, alternatives, strict=True):
        text = tokenizer.token_text(token_id) if tokenizer else ""
        found.tokens.append(text)
        found.token_logprobs.append(entries[token_id].logprob if entries else None)
        found.top_logprobs.append(_by_text(entries) if entries else None)
        found.text_offset.append(offset)
        offset += len(text)
    return found


def _by_text(entries: TokenAlternatives) -> dict[str, float]:
    texts: dict[str, float] = {}
    for entry in entries.values():
        texts[entry.decoded_token] = max(entry.logprob, texts.get(entry.decoded_token, entry.logprob))
    return texts


def chat_logprobs(
    token_ids: Sequence[int], alternatives: Sequence[TokenAlternatives], top: int, tokenizer: Tokenizer
) -> ChatLogprobs:
    """One entry per token, with the `top` likeliest tokens in order."""
    return ChatLogprobs(
        content=[
            _token(token_id, entries, top, tokenizer) for token_id, entries in zip(token_ids, alternatives, strict=True)
        ]
    )


def _token(token_id: int, entries: TokenAlternatives, top: int, tokenizer: Tokenizer) -> TokenLogprob:
    likeliest = sorted((entry.rank, other) for other, entry in entries.items() if entry.rank <= top)
    chosen = entries[token_id]
    return TokenLogprob(
        token=chosen.decoded_token,
        logprob=chosen.logprob,
        bytes=list(tokenizer.token_bytes[token_id]),
        top_logprobs=[
            TopLogprob(
                token=entries[other].decoded_token,
                logprob=entries[other].logprob,
                bytes=list(tokenizer.token_bytes[other]),
            )
            for _, other in likeliest
        ],
    )
