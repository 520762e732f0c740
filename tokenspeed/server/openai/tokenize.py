"""/tokenize, /detokenize and /tokenizer_info, in vLLM's shapes."""

from __future__ import annotations

import asyncio

import msgspec
from starlette.responses import Response

from tokenspeed.server.errors import ApiError
from tokenspeed.server.openai.prompts import SHORT_TEXT, encode_text, render
from tokenspeed.server.openai.requests import decode_detokenize, decode_tokenize
from tokenspeed.server.state import ServerState


class Tokens(msgspec.Struct, kw_only=True):
    """token_strs: the text of each id, where it was asked for."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Text(msgspec.Struct):
    """prompt: what the ids say."""

    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """Texts of special tokens, and the model's own template; null for what there is none of."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | None


async def tokenize(state: ServerState, body: bytes) -> Response:
    """Ids of a text or of a conversation, of any length. Raises ApiError, and ParameterError or PromptError where the
    model has no tokenizer or template, or the text is not valid Unicode."""
    request = decode_tokenize(body)
    engine, tokenizer = state.ready(request.model), state.tokenizer
    if request.messages is None:
        text, special = request.prompt or "", request.add_special_tokens is not False
    else:
        prompted = request.add_generation_prompt is not False
        text = render(request.messages, request.chat_template_kwargs or {}, state, prompted)
        special = request.add_special_tokens is True
    ids = await encode_text(text, tokenizer, special)
    texts = [tokenizer.token_text(token) for token in ids] if request.return_token_strs else None
    return _reply(Tokens(count=len(ids), max_model_len=engine.info.max_model_len, tokens=ids, token_strs=texts))


async def detokenize(state: ServerState, body: bytes) -> Response:
    """Text of ids, special tokens included. Raises ApiError, for an id outside the vocabulary too."""
    request = decode_detokenize(body)
    state.ready(request.model)
    ids, tokenizer = request.tokens, state.tokenizer
    for token in ids:
        if not 0 <= token < tokenizer.vocab_size:
            last = tokenizer.vocab_size - 1
            raise ApiError(400, f"tokens: id {token} is not in the vocabulary (0 to {last})", "tokens")
    if len(ids) <= SHORT_TEXT:
        return _reply(Text(tokenizer.decode(ids, skip_special_tokens=False)))
    return _reply(Text(await asyncio.to_thread(tokenizer.decode, ids, skip_special_tokens=False)))


def tokenizer_info(state: ServerState) -> Response:
    """What clients that count tokens themselves ask first. Raises ApiError, and PromptError without a tokenizer."""
    state.ready()
    tokenizer = state.tokenizer
    texts = {name: tokenizer.special_tokens.get(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return _reply(TokenizerInfo(**texts, chat_template=tokenizer.chat_template))


def _reply(body: Tokens | Text | TokenizerInfo) -> Response:
    return Response(msgspec.json.encode(body), media_type="application/json")
