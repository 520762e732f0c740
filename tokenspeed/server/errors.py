"""Errors in OpenAI's shape: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import logging
import re

import msgspec
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from tokenspeed.contracts.errors import (
    EngineAsleepError,
    EngineClosedError,
    EngineDeadError,
    ParameterError,
    TokenSpeedError,
)
from tokenspeed.server.client import REQUEST_ID, caller_of_request

logger = logging.getLogger("tokenspeed.server")
_FIRST_WORD = re.compile(r"[a-z][a-z0-9_]*(?=:? )")


class ApiError(TokenSpeedError):
    """An error with its HTTP status. `param`: the field of the request it is about. `code`: a word for programs."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class ErrorDetail(msgspec.Struct, kw_only=True):
    """The object under `error`."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(msgspec.Struct):
    """A whole error response, and the data of an error event."""

    error: ErrorDetail


def api_error(error: Exception) -> ApiError:
    """What a client is told of an exception. A message of ParameterError begins with the parameter's name."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, EngineDeadError):
        return ApiError(503, str(error), code="engine_dead")
    if isinstance(error, EngineAsleepError):
        return ApiError(503, str(error), code="asleep")
    if isinstance(error, EngineClosedError):
        return ApiError(503, str(error), code="shutting_down")
    if isinstance(error, ParameterError):
        word = _FIRST_WORD.match(str(error))
        param = word[0] if word and ("_" in word[0] or word[0] in _PLAIN_NAMES) else None
        return ApiError(400, str(error), param)
    if isinstance(error, TokenSpeedError):
        return ApiError(400, str(error))
    return ApiError(500, "internal error; the server's log has the traceback", code="internal_error")


_KINDS = {429: "rate_limit_error"}
HEADERS = {
    401: {"WWW-Authenticate": "Bearer"},
    408: {"Connection": "close"},  # the rest of the body is still to come
    413: {"Connection": "close"},
    429: {"Retry-After": "1"},
    503: {"Retry-After": "5"},
}
"""Of error responses, by status."""
MOST_QUOTED = 2000
"""Characters of a message, which may quote what was sent."""
_PLAIN_NAMES = frozenset({"n", "seed", "stop", "temperature", "logprobs"})
"""Parameters that could be mistaken for a word."""


def encode_error(error: ApiError) -> bytes:
    """The JSON of an error."""
    kind = "server_error" if error.status >= 500 else _KINDS.get(error.status, "invalid_request_error")
    param = error.param and error.param[:MOST_QUOTED]
    detail = ErrorDetail(message=error.message[:MOST_QUOTED], type=kind, param=param, code=error.code)
    return msgspec.json.encode(ErrorBody(detail))


def error_response(error: ApiError) -> Response:
    """A response of the error's own status; 429 and 503 say when to try again."""
    headers = HEADERS.get(error.status, {})
    return Response(encode_error(error), error.status, headers, "application/json")


def struct_response(body: msgspec.Struct, status: int = 200) -> Response:
    """A struct as JSON."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def on_engine_error(request: Request, error: Exception) -> Response:
    """Exception handler for TokenSpeedError."""
    return error_response(api_error(error))


async def on_http_error(request: Request, error: Exception) -> Response:
    """Exception handler for what the router refuses."""
    assert isinstance(error, HTTPException)
    place = f"{request.method} {request.url.path}"
    response = error_response(ApiError(error.status_code, f"{place}: {error.detail}"))
    response.headers.update(error.headers or {})
    return response


async def on_bug(request: Request, error: Exception) -> Response:
    """Exception handler for everything else; the framework logs the traceback. It stands before all middleware."""
    response = error_response(api_error(error))
    response.headers[REQUEST_ID.decode()] = caller_of_request.get().request_id
    return response
