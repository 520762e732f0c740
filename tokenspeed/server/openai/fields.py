"""The fields of each endpoint: those of its request struct are honoured, the rest is here. Everything else is refused.

Source: OpenAI's API reference for completions and chat completions; vLLM's extra parameters.
"""

from __future__ import annotations

from typing import Any

WITHOUT_EFFECT = frozenset(
    {"metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier", "store", "user"}
)
"""Accepted: they change nothing about the output."""

CHAT_WITHOUT_EFFECT = WITHOUT_EFFECT | {"parallel_tool_calls"}

NEUTRAL: dict[str, tuple[Any, ...]] = {"best_of": (1,), "suffix": ("",)}
"""Known fields that are not supported, with the values (besides null) that ask for nothing."""

CHAT_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "prediction": (),
    "response_format": ({"type": "text"},),
    "verbosity": (),
    "web_search_options": (),
}

POOLING_WITHOUT_EFFECT = frozenset({"user"})

EMBEDDING_NEUTRAL: dict[str, tuple[Any, ...]] = {"add_special_tokens": (True,), "truncate_prompt_tokens": ()}

SCORE_NEUTRAL: dict[str, tuple[Any, ...]] = {"truncate_prompt_tokens": ()}

RERANK_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "max_chunks_per_doc": (),
    "max_tokens_per_doc": (),
    "rank_fields": (),
    "truncate_prompt_tokens": (),
    "truncation": (False,),
}
"""Cohere's and Jina's: ways to score a part of a document."""

TOKENIZE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "chat_template": (),
    "continue_final_message": (False,),
    "mm_processor_kwargs": (),
    "tools": ([],),
}
