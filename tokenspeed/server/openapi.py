"""/openapi.json: made of the structs that decode requests and make answers, and of this server's limits and keys.

Source: https://spec.openapis.org/oas/v3.2.0.html.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from tokenspeed import __version__
from tokenspeed.server.bounds import field_bounds
from tokenspeed.server.client import ID_PATTERN
from tokenspeed.server.errors import HEADERS, ErrorBody
from tokenspeed.server.keys import ADMIN_PREFIX
from tokenspeed.server.openai.requests import Form
from tokenspeed.server.operations import BODY_ERRORS, OPERATIONS, Operation
from tokenspeed.server.state import ServerState

JSON, EVENTS = "application/json", "text/event-stream"
_REF = "#/components/schemas/{name}"
_REASONS = {
    200: "done",
    400: "the request cannot be taken: the message names what is wrong and the limit",
    401: "a wrong key, or none",
    403: "not allowed here",
    404: "no such model",
    408: "the body did not come in time",
    409: "requests under way are in the way",
    413: "the body is too long",
    415: "the body is not JSON",
    429: "too many wait",
    503: "loading, shutting down, restarting, asleep, or the engine has died",
    504: "the request took too long",
}
Schema = dict[str, Any]


def openapi(state: ServerState) -> Schema:
    """The document, as JSON values. Of `state` only what its flags have set counts."""
    security = _security(state)
    paths: dict[str, Schema] = {}
    for operation in OPERATIONS:
        paths.setdefault(operation.path, {})[operation.method] = _operation(operation, state)
    return {
        "openapi": "3.2.0",
        "info": {"title": "TokenSpeed", "version": __version__, "license": {"name": "Apache-2.0"}},
        "paths": paths,
        "components": {
            "schemas": _schemas(state),
            "responses": {str(status): _error(status) for status in _REASONS if status != 200},
            "headers": _headers(),
            **({"securitySchemes": security} if security else {}),
        },
    }


def _security(state: ServerState) -> dict[str, Schema]:
    asked = {"apiKey": bool(state.access.keys), "adminKey": state.admin_key is not None}
    return {name: {"type": "http", "scheme": "bearer"} for name, is_asked in asked.items() if is_asked}


def _key_of(operation: Operation, state: ServerState) -> str | None:
    """The scheme that a route asks for; None where it is open."""
    if operation.path.startswith(ADMIN_PREFIX):
        return "adminKey" if state.admin_key is not None else None
    return "apiKey" if state.access.keys and operation.path not in state.access.open_paths else None


def _operation(operation: Operation, state: ServerState) -> Schema:
    key = _key_of(operation, state)
    errors = set(operation.errors) | (BODY_ERRORS if operation.takes is not None else set())
    if key is not None:
        errors.add(401)
    elif operation.path.startswith(ADMIN_PREFIX):
        errors.add(403)
    made: Schema = {
        "operationId": operation.name,
        "summary": operation.summary,
        "responses": {"200": _answer(operation)} | {str(status): _shared(status) for status in sorted(errors)},
    }
    if operation.unwell is not None:
        made["responses"]["503"] = _response(503, _json(operation.unwell))
    if operation.takes is not None:
        content = {JSON: {"schema": _ref(_taken(operation.takes))}}
        made["requestBody"] = {"required": operation.needs_body, "content": content}
    if key is not None:
        made["security"] = [{key: []}]
    return made


def _answer(operation: Operation) -> Schema:
    if isinstance(operation.gives, str):
        return _response(200, {operation.gives: {"schema": {"type": "string"}}})
    content = _json(operation.gives)
    if operation.events is not None:
        data = {"contentMediaType": JSON, "contentSchema": {"anyOf": [_ref(operation.events), _ref(ErrorBody)]}}
        texts = [{"const": "[DONE]"}, {"type": "string"} | data]
        item = {"type": "object", "required": ["data"], "properties": {"data": {"anyOf": texts}}}
        content[EVENTS] = {"itemSchema": item}
    return _response(200, content)


def _shared(status: int) -> Schema:
    return {"$ref": f"#/components/responses/{status}"}


def _error(status: int) -> Schema:
    return _response(status, _json(ErrorBody), HEADERS.get(status, {}))


def _response(status: int, content: Schema, headers: Iterable[str] = ()) -> Schema:
    names = ["x-request-id", *(name for name in headers if name != "Connection")]
    refs = {name: {"$ref": f"#/components/headers/{name}"} for name in names}
    return {"description": _REASONS[status], "headers": refs, "content": content}


def _headers() -> dict[str, Schema]:
    own = {"x-request-id": {"required": True, "schema": {"type": "string", "pattern": f"^{ID_PATTERN}$"}}}
    sent = {name for headers in HEADERS.values() for name in headers} - {"Connection"}
    return own | {name: {"required": True, "schema": {"type": "string"}} for name in sorted(sent)}


def _json(kind: type) -> Schema:
    return {JSON: {"schema": _ref(kind)}}


def _ref(kind: type) -> Schema:
    return {"$ref": _REF.format(name=kind.__name__)}


def _taken(takes: Form[Any] | type[msgspec.Struct]) -> type[msgspec.Struct]:
    return takes.honoured if isinstance(takes, Form) else takes


def _schemas(state: ServerState) -> dict[str, Schema]:
    kinds: list[type] = [ErrorBody]
    for each in OPERATIONS:
        found = (each.takes and _taken(each.takes), each.gives, each.events, each.unwell)
        kinds += [kind for kind in found if isinstance(kind, type)]
    _, schemas = msgspec.json.schema_components(dict.fromkeys(kinds), ref_template=_REF)
    for form in (each.takes for each in OPERATIONS if isinstance(each.takes, Form)):
        _complete(schemas[form.honoured.__name__], form, field_bounds(form, state.limits))
    return schemas


def _complete(schema: Schema, form: Form[Any], bounds: Mapping[str, Schema]) -> None:
    """Add what the struct does not say: bounds, and the fields that it does not hold."""
    properties = schema["properties"]
    for name in properties.keys() & bounds.keys():
        properties[name] |= bounds[name]
    for name in sorted(form.without_effect):
        properties[name] = {"description": "accepted, without effect"}
    for name, values in form.neutral.items():
        properties[name] = {"description": "not supported", "enum": [None, *values]}
    schema["additionalProperties"] = False
