"""JSON schemas as TypeScript, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tokenspeed.parsing.typescript import declare


def parameter(schema: Any, root: dict[str, Any] | None = None) -> str:
    text = declare({"name": "f", "parameters": {"type": "object", "properties": {"x": schema}, **(root or {})}})
    assert text.startswith("type f = (_: {\nx?: ")
    assert text.endswith(",\n}) => any;\n\n")
    return text.removeprefix("type f = (_: {\nx?: ").removesuffix(",\n}) => any;\n\n")


@pytest.mark.parametrize(
    "schema, written",
    [
        ({"type": "integer"}, "number"),
        ({"type": "boolean"}, "boolean"),
        ({"type": ["string", "null"]}, "string | null"),
        ({"type": "string", "nullable": True}, "string | null"),
        ({"type": "array", "items": {"type": "number"}}, "number[]"),
        ({"type": "array", "items": {"enum": ["a", 1]}}, '("a" | 1)[]'),
        ({"type": "array"}, "any[]"),
        ({"const": "é"}, '"é"'),
        ({"anyOf": [{"type": "string"}, {"type": "string"}, {"type": "null"}]}, "string | null"),
        ({"oneOf": [{"type": "number"}, {"const": 2}]}, "number | 2"),
        ({"type": "object"}, "object"),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, "{\na: any,\n}"),
        ({"type": "money"}, "any"),
        (True, "any"),
        ({"$ref": "#/$defs/gone"}, "any"),
        ({"$ref": "other.json"}, "any"),
    ],
)
def test_types(schema: Any, written: str) -> None:
    assert parameter(schema) == written


def test_references_even_into_themselves() -> None:
    place = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    assert parameter({"$ref": "#/$defs/place"}, {"$defs": {"place": place}}) == "{\ncity: string,\n}"
    tree = {"type": "array", "items": {"$ref": "#/$defs/tree"}}
    assert parameter({"$ref": "#/$defs/tree"}, {"$defs": {"tree": tree}}).startswith("any[]")


def test_comments_defaults_and_examples() -> None:
    text = declare(
        {
            "name": "f",
            "description": "First.\n\nSecond.",
            "parameters": {
                "properties": {
                    "a": {"type": "string", "default": "x", "examples": ["y", "z"]},
                    "b": {"type": "integer", "default": 3, "description": "How many."},
                },
                "required": ["b"],
            },
        }
    )
    assert text == (
        "// First.\n//\n// Second.\ntype f = (_: {\n"
        '// Examples:\n// - "y"\n// - "z"\na?: string, // default: "x"\n'
        "// How many.\nb: number, // default: 3\n}) => any;\n\n"
    )


def test_a_function_without_parameters() -> None:
    assert declare({"name": "now"}) == "type now = () => any;\n\n"
