"""Lines of OpenAI's batch input: what each asks for, and what is wrong with it.

Source: OpenAI's API reference, "The request input object" of Batch.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgspec

from tokenspeed.server.batch.lines import Line
from tokenspeed.server.errors import ApiError

MAX_LINE_BYTES = 32 * 2**20
"""As long as a body over HTTP may be by default."""
FIELDS = frozenset({"custom_id", "method", "url", "body"})
DUPLICATE = "duplicate_custom_id"
_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])
_text = msgspec.json.Decoder(str)
_ERRORS = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)
Fields = Mapping[str, msgspec.Raw]


class BatchRequest(NamedTuple):
    """body: JSON, not looked into yet."""

    url: str
    body: bytes


class _Streaming(msgspec.Struct):
    stream: bool | None = None


_streaming = msgspec.json.Decoder(_Streaming)


def line_fields(line: Line) -> Fields:
    """The fields of a line. Raises ApiError for one that is too long or no JSON object."""
    if line.cut:
        text = f"line {line.number} is longer than {MAX_LINE_BYTES} bytes"
        raise ApiError(413, text, code="line_too_long")
    try:
        return _fields.decode(line.raw)
    except _ERRORS as error:
        text = f"line {line.number} is not a JSON object: {error}"
        raise ApiError(400, text, code="invalid_json_line") from None


def custom_id_of(fields: Fields, number: int) -> str:
    """Raises ApiError where line `number` has none."""
    custom_id = _text_of(fields, "custom_id", number)
    if not custom_id:
        raise ApiError(400, f"line {number}: custom_id is empty", "custom_id", "invalid_line")
    return custom_id


def request_of(fields: Fields, number: int, urls: Collection[str]) -> BatchRequest:
    """What line `number` asks of one of the `urls`. Raises ApiError that names what cannot be done."""
    unknown = sorted(set(fields) - FIELDS)
    if unknown:
        raise ApiError(400, f"line {number}: unknown field: {', '.join(unknown)}", unknown[0], "invalid_line")
    method, url = _text_of(fields, "method", number), _text_of(fields, "url", number)
    if method != "POST":
        raise ApiError(405, f"line {number}: method must be POST, got {method!r}", "method", "invalid_method")
    if url not in urls:
        known = ", ".join(urls)
        raise ApiError(404, f"line {number}: no url {url!r} in a batch (known: {known})", "url", "invalid_url")
    if "body" not in fields:
        raise _missing("body", number)
    body = bytes(fields["body"])
    if _streams(body):
        text = f"line {number}: stream does not go with a batch: leave it out"
        raise ApiError(400, text, "stream", "unsupported_parameter")
    return BatchRequest(url, body)


def _text_of(fields: Fields, name: str, number: int) -> str:
    if name not in fields:
        raise _missing(name, number)
    try:
        return _text.decode(fields[name])
    except _ERRORS:
        raise ApiError(400, f"line {number}: {name} must be a text", name, "invalid_line") from None


def _missing(name: str, number: int) -> ApiError:
    return ApiError(400, f"line {number}: {name} is missing", name, "invalid_line")


def _streams(body: bytes) -> bool:
    try:
        return bool(_streaming.decode(body).stream)
    except _ERRORS:
        return False  # the endpoint says what is wrong with it
