"""Functions as TypeScript declares them, from their JSON schemas: how gpt-oss is told of its tools."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

Schema = Mapping[str, Any]
_NAMES = {"integer": "number", "number": "number", "string": "string", "boolean": "boolean", "null": "null"}
_DEPTH = 16
"""Of references into each other, beyond which a type is any."""


def declare(function: Mapping[str, Any]) -> str:
    """`type NAME = (_: {...}) => any;` of a function {name, description, parameters}, its description as a comment in
    front, and an empty line behind."""
    parameters = function.get("parameters") or {}
    taken = ""
    if parameters.get("properties"):
        taken = f"_: {_type(parameters, parameters, 0)}"
    comments = "".join(_comments(function.get("description")))
    return f"{comments}type {function['name']} = ({taken}) => any;\n\n"


def _comments(text: Any) -> Iterator[str]:
    if text:
        yield from (f"// {line}".rstrip() + "\n" for line in str(text).splitlines())


def _type(schema: Any, root: Schema, depth: int) -> str:
    """A schema's type. root: where references lead."""
    if not isinstance(schema, Mapping) or depth > _DEPTH:
        return "any"
    found = _plain_type(schema, root, depth)
    if schema.get("nullable") and "null" not in found.split(" | "):
        return f"{found} | null"
    return found


def _plain_type(schema: Schema, root: Schema, depth: int) -> str:
    if "$ref" in schema:
        return _type(_resolved(schema["$ref"], root), root, depth + 1)
    if "enum" in schema:
        return " | ".join(_literal(value) for value in schema["enum"]) or "any"
    if "const" in schema:
        return _literal(schema["const"])
    for union in ("oneOf", "anyOf"):
        if schema.get(union):
            return " | ".join(dict.fromkeys(_type(each, root, depth + 1) for each in schema[union]))
    kind = schema.get("type")
    if isinstance(kind, list):
        return " | ".join(_type({**schema, "type": each}, root, depth + 1) for each in kind) or "any"
    if kind == "array":
        item = _type(schema.get("items"), root, depth + 1)
        return f"({item})[]" if " | " in item else f"{item}[]"
    if kind == "object" or (kind is None and "properties" in schema):
        return _object(schema, root, depth)
    return _NAMES.get(str(kind), "any")


def _object(schema: Schema, root: Schema, depth: int) -> str:
    properties, required = schema.get("properties"), schema.get("required") or ()
    if not properties:
        return "object"
    lines: list[str] = []
    for name, value in properties.items():
        given = value if isinstance(value, Mapping) else {}
        lines += _comments(given.get("description"))
        if given.get("examples"):
            lines.append("// Examples:\n")
            lines += (f"// - {_literal(each)}\n" for each in given["examples"])
        optional = "" if name in required else "?"
        lines.append(f"{name}{optional}: {_type(value, root, depth + 1)},{_default(given)}\n")
    return "{\n" + "".join(lines) + "}"


def _default(schema: Schema) -> str:
    if "default" not in schema:
        return ""
    value = schema["default"]
    shown = value if isinstance(value, str) and "enum" in schema else _literal(value)
    return f" // default: {shown}"


def _resolved(reference: Any, root: Schema) -> Any:
    """What a reference within the same schema means; None for others."""
    if not isinstance(reference, str) or not reference.startswith("#/"):
        return None
    found: Any = root
    for name in reference[2:].split("/"):
        found = found.get(name.replace("~1", "/").replace("~0", "~")) if isinstance(found, Mapping) else None
    return found


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
