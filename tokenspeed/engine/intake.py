"""From what a caller gives to a Request: prompts become ids, defaults are filled in. No torch."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tokenspeed.config.source import ModelFormat, ModelSource
from tokenspeed.contracts.errors import ModelNotFoundError, ParameterError, PromptError
from tokenspeed.contracts.request import Request
from tokenspeed.contracts.sampling import RequestOutputKind, SamplingParams, resolve_bad_words, to_row
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.messages import EngineInfo
from tokenspeed.formats.gguf import open_gguf
from tokenspeed.tokenizer.base import Tokenizer
from tokenspeed.tokenizer.load import load_tokenizer

_UNSAMPLED = SamplingParams(max_tokens=1, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY)
"""Of requests that pool."""
_SCORED = ("all its labels", "tokens that are named")


def open_tokenizer(path: str, format: ModelFormat, name: str) -> Tokenizer | None:
    """The tokenizer that lies beside a model's weights; None for a model without one, which takes and gives ids alone.

    Raises FormatError on a broken one, UnsupportedError on a kind that is not supported.
    """
    source = ModelSource(Path(path), format, name)
    metadata = open_gguf(source.path).metadata if format == "gguf" else None
    if metadata is not None and "tokenizer.ggml.model" not in metadata:
        return None
    try:
        return load_tokenizer(source, metadata)
    except ModelNotFoundError:
        return None


class Intake:
    """Makes the requests of one loaded model, and refuses the prompts that it cannot take.

    seed: makes requests that name none repeatable, in the order of their coming.
    """

    def __init__(self, info: EngineInfo, tokenizer: Tokenizer | None, seed: int | None) -> None:
        self._info = info
        self._tokenizer = tokenizer
        self._seeds = _seeds(seed)
        self._eos = list(dict.fromkeys([*info.eos_token_ids, *(tokenizer.eos_token_ids if tokenizer else ())]))

    def request(
        self, request_id: str, prompt: str | list[int], params: SamplingParams | Pooling, priority: int, cache_salt: str
    ) -> Request:
        """Raises PromptError on a prompt that is empty, too long, or outside the vocabulary, and on text for a model
        without a tokenizer; ParameterError on token ids outside the vocabulary, on bad words that are text where there
        is no tokenizer, where no token is left to choose, and for what the model's head cannot give."""
        ids = self._encode(prompt) if isinstance(prompt, str) else list(prompt)
        self._check_prompt(ids, spare=0 if isinstance(params, Pooling) else 1)
        if isinstance(params, Pooling):
            self._check_pooling(params)
            return Request(
                request_id=request_id,
                prompt_token_ids=ids,
                params=_UNSAMPLED,
                seed=0,
                cache_salt=cache_salt,
                priority=priority,
                pooling=params,
            )
        if self._info.headless or self._info.num_labels:
            raise ParameterError(f"model: {self._info.model} completes nothing: it has {self._head}")
        self._check_ids(params.token_ids())
        tokenizer = self._tokenizer
        if tokenizer is not None and params.bad_words:
            params = resolve_bad_words(params, lambda text: tokenizer.encode(text, add_special_tokens=False))
        if params.bad_words or params.allowed_token_ids is not None:
            to_row(params, 0, self._eos)  # what it refuses would be the end of the engine
        seed = params.seed if params.seed is not None else next(self._seeds)
        return Request(
            request_id=request_id,
            prompt_token_ids=ids,
            params=params,
            seed=seed % 2**64,
            eos_token_ids=self._eos,
            cache_salt=cache_salt,
            priority=priority,
        )

    def _encode(self, text: str) -> list[int]:
        if self._tokenizer is None:
            raise PromptError("this model has no tokenizer: give token ids")
        if not text:
            raise PromptError("the prompt is empty")
        return self._tokenizer.encode(text)

    def _check_pooling(self, pooling: Pooling) -> None:
        info = self._info
        self._check_ids({"token_ids": pooling.token_ids})
        if pooling.kind == "score" and info.headless:
            raise ParameterError(f"model: {info.model} scores nothing: it has {self._head}")
        if pooling.kind == "score" and bool(pooling.token_ids) == bool(info.num_labels):
            raise ParameterError(f"model: {info.model} has {self._head}: it scores {_SCORED[not info.num_labels]}")

    @property
    def _head(self) -> str:
        if self._info.headless:
            return "no head, and gives embeddings alone"
        labels = self._info.num_labels
        return f"a classification head of {labels} labels in place of a language head" if labels else "a language head"

    def _check_ids(self, wanted: Mapping[str, Sequence[int]]) -> None:
        for name, ids in wanted.items():
            for token in ids:
                if not 0 <= token < self._info.vocab_size:
                    raise ParameterError(
                        f"{name}: token id {token} is not in the vocabulary (0 to {self._info.vocab_size - 1})"
                    )

    def _check_prompt(self, ids: list[int], spare: int) -> None:
        """spare: tokens that it must leave room for."""
        info = self._info
        if not ids:
            raise PromptError("the prompt is empty")
        if len(ids) + spare > info.max_model_len:
            allowed = f"allows {info.max_model_len - 1} and one sampled token" if spare else "allows no more"
            raise PromptError(f"the prompt has {len(ids)} tokens, max_model_len {info.max_model_len} {allowed}")
        for token in ids:
            if type(token) is not int or not 0 <= token < info.vocab_size:
                raise PromptError(f"prompt token id {token!r} is not in the vocabulary (0 to {info.vocab_size - 1})")


def _seeds(seed: int | None) -> Iterator[int]:
    if seed is None:
        while True:
            yield secrets.randbits(64)
    for number in itertools.count():
        yield (seed * 0x9E3779B97F4A7C15 + number) % 2**64
