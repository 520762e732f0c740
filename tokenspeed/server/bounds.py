"""Bounds of the fields of requests, in JSON schema, as `SamplingParams`, `Limits` and the endpoints check them."""

from __future__ import annotations

import math
from typing import Any

from tokenspeed.config.serving import Limits
from tokenspeed.contracts.sampling import INTEGERS, REALS
from tokenspeed.server.openai.prompts import RESERVED_VARIABLES
from tokenspeed.server.openai.requests import CHAT, COMPLETION, EMBEDDING, RERANK, SCORE, Form
from tokenspeed.server.openai.sampling import MAX_TOP_LOGPROBS

Schema = dict[str, Any]
_TEXT = {"type": "string", "minLength": 1}
_ID = {"type": "integer", "minimum": 0}
_IDS = {"type": "array", "items": _ID, "minItems": 1}


def field_bounds(form: Form[Any], limits: Limits) -> dict[str, Schema]:
    """By name, what a schema of the field's type lacks. What hangs on the model or on another field is not here."""
    if form is COMPLETION:
        least = 0  # for an echo alone
        own = {"max_tokens": _span(least, INTEGERS["max_tokens"][1]), "prompt": _prompt(limits)}
        return _sampling(limits) | own
    if form is EMBEDDING:
        return {"input": _prompt(limits), "dimensions": _span(1, math.inf), "cache_salt": {"minLength": 1}}
    if form in (SCORE, RERANK):
        several = {"minItems": 1, "maxItems": limits.max_choices}
        texts = _items({"type": "string"}) | several
        bounds = {"text_1": texts, "text_2": texts, "documents": several, "top_n": _span(1, math.inf)}
        return bounds | {"cache_salt": {"minLength": 1}}
    if form is CHAT:
        top = min(MAX_TOP_LOGPROBS, limits.max_logprobs)
        own = {"logprobs": {}, "top_logprobs": _span(0, top), "max_completion_tokens": _span(*INTEGERS["max_tokens"])}
        return _sampling(limits) | own | _conversation()
    return _conversation() | {"tokens": _items(_ID)}


def _sampling(limits: Limits) -> dict[str, Schema]:
    length = {"minLength": 1, "maxLength": limits.max_stop_len}
    return {name: _span(*span) for name, span in (REALS | INTEGERS).items()} | {
        "n": _span(1, limits.max_n),
        "logprobs": _span(0, limits.max_logprobs),
        "prompt_logprobs": _span(0, limits.max_logprobs),
        "top_p": {"exclusiveMinimum": 0, "maximum": 1},
        "stop": length | _items({"type": "string"} | length) | {"maxItems": limits.max_stop},
        "stop_token_ids": _items(_ID),
        "allowed_token_ids": _items(_ID) | {"minItems": 1},
        "bad_words": _items({"type": "string"} | length) | {"maxItems": limits.max_stop},
        "logit_bias": {"propertyNames": {"pattern": "^(0|[1-9][0-9]{0,8})$"}},
        "cache_salt": {"minLength": 1},
    }


def _prompt(limits: Limits) -> Schema:
    """A list holds one kind alone, which the struct's type cannot say."""
    several = {"type": "array", "minItems": 1, "maxItems": limits.max_choices}
    return {"anyOf": [_TEXT, _IDS, several | _items(_TEXT), several | _items(_IDS)]}


def _conversation() -> dict[str, Schema]:
    taken = {"propertyNames": {"not": {"enum": sorted(RESERVED_VARIABLES)}}}
    return {"messages": {"minItems": 1}, "chat_template_kwargs": taken}


def _span(least: float, most: float) -> Schema:
    return {"minimum": least} | ({"maximum": most} if most < math.inf else {})


def _items(schema: Schema) -> Schema:
    return {"items": schema}
