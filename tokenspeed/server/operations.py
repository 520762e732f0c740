"""The routes: what each takes, gives and answers when it fails."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from tokenspeed.server.admin import AdminState, NoBody, ProfileBody, ProfileFile, SleepBody
from tokenspeed.server.openai.requests import (
    CHAT,
    COMPLETION,
    DETOKENIZE,
    EMBEDDING,
    RERANK,
    SCORE,
    TOKENIZE,
    Form,
)
from tokenspeed.server.openai.responses import (
    ChatChunk,
    ChatCompletion,
    Completion,
    Embeddings,
    ModelList,
    Ranking,
    Scores,
)
from tokenspeed.server.openai.tokenize import Text, TokenizerInfo, Tokens
from tokenspeed.server.reports import HealthReport, Version

BODY_ERRORS = {400, 408, 413}
"""Of routes that take a body."""
_GENERATING = (404, 415, 429, 503, 504)
_TEXT = (404, 415, 503)


@dataclass(frozen=True)
class Operation:
    """takes: its body. gives: the body of a 200, a struct or the media type of a text. events: the data of a stream's
    events, where one may be asked for. errors: statuses of failures, besides those of keys and bodies. unwell: the body
    of a 503 that is no error."""

    method: str
    path: str
    summary: str
    gives: type[msgspec.Struct] | str
    takes: Form[Any] | type[msgspec.Struct] | None = None
    needs_body: bool = True
    events: type[msgspec.Struct] | None = None
    errors: tuple[int, ...] = ()
    unwell: type[msgspec.Struct] | None = None

    @property
    def name(self) -> str:
        """A name of its own."""
        return "_".join([self.method, *self.path.replace(".", "_").strip("/").split("/")])


def _change(
    path: str,
    summary: str,
    takes: type[msgspec.Struct] = NoBody,
    gives: type[msgspec.Struct] = AdminState,
    needs_body: bool = False,
    errors: tuple[int, ...] = (503,),
) -> Operation:
    return Operation("post", f"/admin/{path}", summary, gives, takes, needs_body, errors=errors)


OPERATIONS = (
    Operation(
        "post", "/v1/completions", "Complete a prompt", Completion, COMPLETION, events=Completion, errors=_GENERATING
    ),
    Operation("post", "/v1/chat/completions", "Answer", ChatCompletion, CHAT, events=ChatChunk, errors=_GENERATING),
    Operation("post", "/v1/embeddings", "Texts to vectors", Embeddings, EMBEDDING, errors=_GENERATING),
    Operation("post", "/v1/score", "How well texts answer others", Scores, SCORE, errors=_GENERATING),
    Operation("post", "/v1/rerank", "Documents, the best answer first", Ranking, RERANK, errors=_GENERATING),
    Operation("post", "/rerank", "The same", Ranking, RERANK, errors=_GENERATING),
    Operation("get", "/v1/models", "The names it is served under", ModelList, errors=(503,)),
    Operation("post", "/tokenize", "A prompt, or messages, to ids", Tokens, TOKENIZE, errors=_TEXT),
    Operation("post", "/detokenize", "Ids to text", Text, DETOKENIZE, errors=_TEXT),
    Operation("get", "/tokenizer_info", "Special tokens and the chat template", TokenizerInfo, errors=_TEXT),
    Operation("get", "/health", "Whether requests are served", HealthReport, unwell=HealthReport),
    Operation("get", "/metrics", "Prometheus' text format", "text/plain"),
    Operation("get", "/version", "The version", Version),
    Operation("get", "/admin/state", "What the server and its engine do", AdminState),
    _change("pause", "Let new requests wait"),
    _change("resume", "Let them go on"),
    _change("reset_prefix_cache", "Forget every prefix", errors=(409, 503)),
    _change("sleep", "Give the memory of the KV cache back", SleepBody, errors=(409, 503)),
    _change("wake", "Take it again", errors=(409, 503)),
    _change("profile", "Trace the next steps", ProfileBody, ProfileFile, needs_body=True, errors=(403, 409, 503)),
)
"""All but /openapi.json itself, which is made of them."""
