"""Bodies of responses and of stream events, in OpenAI's shapes. `token_ids` are there where they were asked for."""

from __future__ import annotations

from typing import Literal

import msgspec

from tokenspeed.engine.output import TokenAlternatives

TopLogprobs = list[dict[str, float] | None]
PromptLogprobs = list[TokenAlternatives | None]
"""As in vLLM: per token of the prompt null, or by id the token and its alternatives."""


class CachedTokens(msgspec.Struct):
    """Prompt tokens that the prefix cache held."""

    cached_tokens: int


class Usage(msgspec.Struct, kw_only=True):
    """A prompt counts once, whatever n; the tokens of all samples count."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class PoolingUsage(msgspec.Struct, kw_only=True):
    """Nothing is generated."""

    prompt_tokens: int
    total_tokens: int


class Embedding(msgspec.Struct, kw_only=True):
    """The vector of one input: numbers, or their float32 bytes (little-endian) in base64."""

    index: int
    embedding: list[float] | str
    object: Literal["embedding"] = "embedding"


class Embeddings(msgspec.Struct, kw_only=True):
    """Of all inputs, in their order."""

    data: list[Embedding]
    model: str
    usage: PoolingUsage
    object: Literal["list"] = "list"


class Score(msgspec.Struct, kw_only=True):
    """Of one pair."""

    index: int
    score: float
    object: Literal["score"] = "score"


class Scores(msgspec.Struct, kw_only=True):
    """In the order of the pairs, in vLLM's shape."""

    id: str
    created: int
    model: str
    data: list[Score]
    usage: PoolingUsage
    object: Literal["list"] = "list"


class RankedDocument(msgspec.Struct, kw_only=True):
    """As it was sent."""

    text: str


class Ranked(msgspec.Struct, kw_only=True):
    """index: its place in the request."""

    index: int
    relevance_score: float
    document: RankedDocument | msgspec.UnsetType = msgspec.UNSET


class Ranking(msgspec.Struct, kw_only=True):
    """The best first, in the shape of Jina's and Cohere's and vLLM's."""

    id: str
    model: str
    results: list[Ranked]
    usage: PoolingUsage


class Timings(msgspec.Struct, kw_only=True):
    """Milliseconds; null where unknown. ttft is queue (until its first step) and prefill together, tpot the mean per
    token after the first. share_of_floor: of tpot, what reading weights and context once takes at this machine's
    bandwidth. fallback_ops: ops without a fast kernel."""

    queue_ms: float | None
    prefill_ms: float | None
    ttft_ms: float | None
    tpot_ms: float | None
    cached_tokens: int
    share_of_floor: float | None
    fallback_ops: list[str]


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Lists of one entry per token. An echoed prompt's first token has null: nothing predicts it."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: TopLogprobs
    text_offset: list[int]


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One sample, or what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class Completion(msgspec.Struct, kw_only=True):
    """A completion, and an event of one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET


class TopLogprob(msgspec.Struct, kw_only=True):
    """An alternative. `bytes`: of the token, which may be a part of a character."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, kw_only=True):
    """A token and its alternatives."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """One entry per token."""

    content: list[TokenLogprob]
    refusal: None = None


class FunctionCall(msgspec.Struct, kw_only=True):
    """arguments: JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True):
    """A call that the answer makes."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ChatMessage(msgspec.Struct, kw_only=True):
    """The answer. content is null where it only calls tools; reasoning_content is there where the model's chat format
    tells thoughts apart."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | msgspec.UnsetType = msgspec.UNSET
    tool_calls: list[ToolCall] | msgspec.UnsetType = msgspec.UNSET


class FunctionDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is new of a call's function; the name comes first."""

    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct, kw_only=True):
    """What is new of a call; id and type come first."""

    index: int
    id: str | msgspec.UnsetType = msgspec.UNSET
    type: Literal["function"] | msgspec.UnsetType = msgspec.UNSET
    function: FunctionDelta


class ChatDelta(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What is new of the answer; the role comes first."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChoice(msgspec.Struct, kw_only=True):
    """One sample."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """What is new of a sample."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None
    token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """A chat completion."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    timings: Timings
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET
    prompt_logprobs: PromptLogprobs | msgspec.UnsetType = msgspec.UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """An event of a chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | msgspec.UnsetType | None = msgspec.UNSET
    timings: Timings | msgspec.UnsetType = msgspec.UNSET
    prompt_token_ids: list[int] | msgspec.UnsetType = msgspec.UNSET


class Model(msgspec.Struct, kw_only=True):
    """An entry of /v1/models. max_model_len: most tokens of a prompt and its output, null while the model loads."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "tokenspeed"
    root: str
    max_model_len: int


class ModelList(msgspec.Struct, kw_only=True):
    """/v1/models."""

    object: Literal["list"] = "list"
    data: list[Model]
