"""Bodies of requests: what is honoured, with its types. Decoding names whatever else a body holds."""

from __future__ import annotations

import re
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec

from tokenspeed.server.errors import ApiError
from tokenspeed.server.openai.fields import (
    CHAT_NEUTRAL,
    CHAT_WITHOUT_EFFECT,
    EMBEDDING_NEUTRAL,
    NEUTRAL,
    POOLING_WITHOUT_EFFECT,
    RERANK_NEUTRAL,
    SCORE_NEUTRAL,
    TOKENIZE_NEUTRAL,
    WITHOUT_EFFECT,
)

Request = TypeVar("Request", bound=msgspec.Struct)
Generating = TypeVar("Generating", bound="GenerationRequest")
Pooled = TypeVar("Pooled", bound="PoolingRequest")
_PLACE = re.compile(r"(?P<problem>.*) - at (`key` in )?`\$\.?(?P<path>.*)`", re.DOTALL)
_MISSING = re.compile(r"missing required field `(\w+)`")
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
Priority = Annotated[int, msgspec.Meta(ge=-(2**31), le=2**31 - 1)]


class StreamOptions(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """include_obfuscation is accepted: there is none."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What both endpoints take. null is the same as leaving a field out."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[int, float] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    priority: Priority | None = None
    cache_salt: str | None = None
    return_token_ids: bool | None = None
    prompt_logprobs: int | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """/tokenize: a prompt, or messages for the template. A template writes special tokens itself, so they are
    added to a prompt alone unless the request says otherwise."""

    model: str | None = None
    prompt: str | None = None
    messages: list[Message] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """/detokenize."""

    model: str | None = None
    tokens: list[int]


class CompletionRequest(GenerationRequest, kw_only=True):
    """/v1/completions. prompt: a text, token ids, or a list of either."""

    prompt: str | list[str | int | list[int]]
    echo: bool | None = None
    logprobs: int | None = None


class PoolingRequest(msgspec.Struct, kw_only=True):
    """What the endpoints take that give no tokens."""

    model: str | None = None
    priority: Priority | None = None
    cache_salt: str | None = None


class EmbeddingRequest(PoolingRequest, kw_only=True):
    """/v1/embeddings. input: a text, token ids, or a list of either. pooling: the last token's state, or the mean."""

    input: str | list[str | int | list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["last", "mean"] | None = None
    normalize: bool | None = None


class ScoreRequest(PoolingRequest, kw_only=True):
    """/v1/score. One text_1 goes with every text_2, several with those at their places."""

    text_1: str | list[str]
    text_2: str | list[str]
    instruction: str | None = None


class Document(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What is ranked."""

    text: str


class RerankRequest(PoolingRequest, kw_only=True):
    """/v1/rerank and /rerank. top_n: how many results."""

    query: str
    documents: list[str | Document]
    top_n: int | None = None
    return_documents: bool | None = None
    instruction: str | None = None


class TextPart(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A part of a message; other types than text are not supported yet."""

    type: Literal["text"]
    text: str


class CalledFunction(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """arguments: JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A call that an assistant's message made."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """One message of a conversation; calls, their results and reasoning_content where the model's chat format knows
    them. refusal is what an assistant's message of ours carries: always null."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None

    def __post_init__(self) -> None:
        if self.content is None and not (self.role == "assistant" and self.tool_calls):
            raise ValueError("Object missing required field `content`")
        if self.tool_call_id is None and self.role == "tool":
            raise ValueError("Object missing required field `tool_call_id`")


class Function(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What a tool is to the model. parameters: a JSON schema, which only describes; strict false says so."""

    name: Annotated[str, msgspec.Meta(pattern="^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: Literal[False] | None = None


class Tool(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """A tool that a reply may call."""

    type: Literal["function"]
    function: Function


class ChatRequest(GenerationRequest, kw_only=True):
    """/v1/chat/completions. chat_template_kwargs: variables for the template. tools, and reasoning_effort: where the
    model's chat format knows them."""

    messages: list[Message]
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    reasoning_effort: str | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None


@dataclass(frozen=True)
class Form(Generic[Request]):
    """The body of one endpoint. honoured: a struct of the fields that count. without_effect: names of those that are
    passed over. neutral: those that are not supported, with the values, besides null, that ask for nothing."""

    honoured: type[Request]
    without_effect: Set[str] = frozenset()
    neutral: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    @cached_property
    def known(self) -> Set[str]:
        """Names that are not refused whatever their value."""
        return self.without_effect | set(self.honoured.__struct_fields__)

    @cached_property
    def decoder(self) -> msgspec.json.Decoder[Request]:
        """Of the fields that count."""
        return msgspec.json.Decoder(self.honoured)


COMPLETION = Form(CompletionRequest, WITHOUT_EFFECT, NEUTRAL)
CHAT = Form(ChatRequest, CHAT_WITHOUT_EFFECT, CHAT_NEUTRAL)
EMBEDDING = Form(EmbeddingRequest, POOLING_WITHOUT_EFFECT, EMBEDDING_NEUTRAL)
SCORE = Form(ScoreRequest, POOLING_WITHOUT_EFFECT, SCORE_NEUTRAL)
RERANK = Form(RerankRequest, POOLING_WITHOUT_EFFECT, RERANK_NEUTRAL)
TOKENIZE = Form(TokenizeRequest, neutral=TOKENIZE_NEUTRAL)
DETOKENIZE = Form(DetokenizeRequest)


def decode_completion(body: bytes) -> CompletionRequest:
    """Raises ApiError naming every field that is unknown, or the one that has a wrong type."""
    return _checked(_decode(body, COMPLETION))


def decode_chat(body: bytes) -> ChatRequest:
    """Raises ApiError naming every field that is unknown, or the one that has a wrong type."""
    return _checked(_decode(body, CHAT))


def decode_pooling(body: bytes, form: Form[Pooled]) -> Pooled:
    """Raises ApiError naming every field that is unknown, or the one that has a wrong type or may not be empty."""
    request = _decode(body, form)
    if request.cache_salt == "":
        raise ApiError(400, "cache_salt must not be empty", "cache_salt")
    return request


def decode_tokenize(body: bytes) -> TokenizeRequest:
    """Raises ApiError naming every field that is unknown, the one that has a wrong type, or the contradiction."""
    request = _decode(body, TOKENIZE)
    if (request.prompt is None) == (request.messages is None):
        raise ApiError(400, "give either prompt or messages", "prompt")
    if request.messages is None:
        for name in ("add_generation_prompt", "chat_template_kwargs"):
            if getattr(request, name) is not None:
                raise ApiError(400, f"{name} needs messages", name)
    return request


def decode_detokenize(body: bytes) -> DetokenizeRequest:
    """Raises ApiError naming every field that is unknown, or the one that has a wrong type."""
    return _decode(body, DETOKENIZE)


def _checked(request: Generating) -> Generating:
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options needs stream", "stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs does not go with stream", "prompt_logprobs")
    return request


def _decode(body: bytes, form: Form[Request]) -> Request:
    try:
        body.decode()  # fields that are passed over are never looked into
        _refuse(_fields.decode(body), form)
        return form.decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _type_error(str(error)) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ApiError(400, f"the body is not JSON: {error}") from None
    except RecursionError:
        raise ApiError(400, "the body is nested too deeply") from None


def _refuse(given: Mapping[str, msgspec.Raw], form: Form[Any]) -> None:
    unknown = sorted(set(given) - form.known - set(form.neutral))
    if unknown:
        raise ApiError(400, f"unknown field: {', '.join(unknown)}", unknown[0], "unknown_parameter")
    for name, values in form.neutral.items():
        if name in given and not _asks_nothing(given[name], values):
            raise ApiError(400, f"{name} is not supported", name, "unsupported_parameter")


def _asks_nothing(given: msgspec.Raw, values: tuple[Any, ...]) -> bool:
    try:
        value = msgspec.json.decode(given)
    except msgspec.ValidationError:  # a number that is too long
        return False
    # true equals 1 in Python, and in no other language
    return value is None or any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values)


def _type_error(text: str) -> ApiError:
    missing = _MISSING.search(text)
    place = _PLACE.fullmatch(text)
    path = place["path"] if place else ""
    if missing:
        path = f"{path}.{missing[1]}" if path else missing[1]
        return ApiError(400, f"{path} is missing", path)
    if place is None:
        return ApiError(400, f"the body must be a JSON object: {text}")
    return ApiError(400, f"{path}: {place['problem']}", path)
