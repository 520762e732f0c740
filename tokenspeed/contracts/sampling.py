"""Sampling parameters of one request, in the names of vLLM's offline API."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import Enum
from typing import Any

import msgspec

from tokenspeed.contracts.errors import ParameterError
from tokenspeed.contracts.step import SamplingRow

logger = logging.getLogger("tokenspeed")

MAX_LOGPROBS = 64
"""Most alternatives a request may ask for per token."""
MAX_N = 16384
"""Most samples of one request."""
MIN_TEMPERATURE = 0.01
"""Lower temperatures, but not 0, are raised to this one."""
MAX_LOGIT_BIAS = 100.0
"""Biases are clamped to plus and minus this."""
_INT31, _INT64 = 2**31 - 1, 2**64 - 1
_FAR = 1e6
"""Beyond it, or below its inverse, nothing changes any more, until float32 overflows and no token can be chosen."""
REALS: dict[str, tuple[float, float]] = {
    "presence_penalty": (-2.0, 2.0),
    "frequency_penalty": (-2.0, 2.0),
    "repetition_penalty": (1 / _FAR, _FAR),
    "temperature": (0.0, _FAR),
    "min_p": (0.0, 1.0),
}
"""Least and most of numbers. top_p is not here: it is above 0 and at most 1."""
INTEGERS: dict[str, tuple[int, int]] = {
    "n": (1, MAX_N),
    "top_k": (-1, _INT31),
    "min_tokens": (0, _INT31),
    "max_tokens": (1, _INT31),
    "seed": (-(2**63), _INT64),
    "logprobs": (0, MAX_LOGPROBS),
    "prompt_logprobs": (0, MAX_LOGPROBS),
}
"""Least and most of integers."""
_HINTS = {
    "best_of": "use n, and choose among outputs by their cumulative_logprob",
    "use_beam_search": "beam search is not supported",
    "beam_width": "beam search is not supported",
    "length_penalty": "it belongs to beam search, which is not supported",
    "truncate_prompt_tokens": "cut the prompt before",
}
"""What to say about some names that are refused."""


class RequestOutputKind(Enum):
    """What each output of a request shows: all so far, what is new, or nothing before the end."""

    CUMULATIVE = 0
    DELTA = 1
    FINAL_ONLY = 2


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How to choose the tokens of one request, when to stop, and what to show of them.

    n: samples. presence_penalty, frequency_penalty in [-2, 2], over the output; repetition_penalty in [1e-6, 1e6], over
    prompt and output. temperature: 0 is greedy; between 0 and 0.01 counts as 0.01; at most 1e6. top_k: 0 or -1 keeps
    all. top_p in (0, 1]. min_p in [0, 1], relative to the most likely token. seed: None or -1 draws one per request.
    logit_bias: by token id, clamped to [-100, 100]. allowed_token_ids: nothing else is sampled; banned_token_ids are
    not. bad_words: texts, or sequences of ids, that are not completed.

    stop: one or more texts that end a sample, left out of its text unless include_stop_str_in_output. stop_token_ids:
    ids that do. min_tokens: neither these nor eos before that many tokens; max_tokens: None for the context's end.
    logprobs, prompt_logprobs: number of alternatives (0 to 64) beside the token itself; None for none.

    logits_processors: callables (output ids so far, logits) -> logits, or (prompt ids, output ids, logits) -> logits,
    applied in order before all of the above; ids are lists of int, logits a float32 tensor [vocabulary], which may be
    changed in place. -inf forbids a token. Log-probabilities are those of the logits before them. `LLM` only.

    Raises ParameterError on a value out of range and on contradictions. Unknown names are refused by `from_dict`, and
    by the constructor as a TypeError.
    """

    n: int = 1
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: str | list[str] = []
    stop_token_ids: list[int] = []
    bad_words: list[str | list[int]] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    max_tokens: int | None = 16
    min_tokens: int = 0
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    detokenize: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    output_kind: RequestOutputKind = RequestOutputKind.CUMULATIVE
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    banned_token_ids: list[int] = []
    logits_processors: list[Any] | None = None

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._check_flags()
        self._check_texts()
        self._check_tokens()
        self._check_processors()
        self._settle()

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SamplingParams:
        """Build from untrusted names and values; an unknown name is a ParameterError that lists the known ones."""
        unknown = sorted(set(fields) - set(cls.__struct_fields__))
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            named = ", ".join(f"{name} ({_HINTS[name]})" if name in _HINTS else name for name in unknown)
            raise ParameterError(f"unknown or unsupported sampling parameter: {named} (supported: {known})")
        return cls(**fields)

    @property
    def stop_strings(self) -> list[str]:
        """`stop` as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop

    def token_ids(self) -> dict[str, list[int]]:
        """Every token id that a field names, by the field's name: to be checked against a vocabulary."""
        words = [token for word in self.bad_words if not isinstance(word, str) for token in word]
        return {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": list(self.logit_bias or ()),
            "allowed_token_ids": self.allowed_token_ids or [],
            "banned_token_ids": self.banned_token_ids,
            "bad_words": words,
        }

    def _check_numbers(self) -> None:
        for name, (low, high) in REALS.items():
            value = _finite(name, getattr(self, name))
            rule = f"in [{low:g}, {high:g}]" if high < _FAR else f"at least {low:g} and at most {high:g}"
            _check(low <= value <= high, name, value, rule)
        _check(0 < _finite("top_p", self.top_p) <= 1, "top_p", self.top_p, "in (0, 1]")

    def _check_lengths(self) -> None:
        for name, (low, high) in INTEGERS.items():
            value = getattr(self, name)
            if value is not None or name in ("n", "top_k", "min_tokens"):
                _check_int(name, value, low, high)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ParameterError(f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}")

    def _check_flags(self) -> None:
        for name in (
            "include_stop_str_in_output",
            "ignore_eos",
            "detokenize",
            "skip_special_tokens",
            "spaces_between_special_tokens",
        ):
            _check(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        if not self.spaces_between_special_tokens:
            raise ParameterError("spaces_between_special_tokens=False is not supported: tokens are joined as they are")
        try:
            self.output_kind = RequestOutputKind(self.output_kind)
        except ValueError:
            names = ", ".join(kind.name for kind in RequestOutputKind)
            raise ParameterError(f"output_kind must be one of {names}, got {self.output_kind!r}") from None

    def _check_texts(self) -> None:
        self.stop = [self.stop] if isinstance(self.stop, str) else list(dict.fromkeys(_listed("stop", self.stop)))
        for text in self.stop:
            _check(isinstance(text, str) and text != "", "stop", text, "texts that are not empty")
        if self.stop and not self.detokenize:
            raise ParameterError("stop needs detokenize: stop strings are looked for in the text")
        self.bad_words = list(_listed("bad_words", self.bad_words))
        for word in self.bad_words:
            if isinstance(word, str):
                _check(word.strip() != "", "bad_words", word, "texts that are not blank")
            else:
                _check(bool(_ids("bad_words", word)), "bad_words", word, "sequences that are not empty")

    def _check_tokens(self) -> None:
        self.stop_token_ids = _ids("stop_token_ids", self.stop_token_ids)
        self.banned_token_ids = _ids("banned_token_ids", self.banned_token_ids)
        if self.allowed_token_ids is not None:
            self.allowed_token_ids = _ids("allowed_token_ids", self.allowed_token_ids)
            if not set(self.allowed_token_ids) - set(self.banned_token_ids):
                raise ParameterError("allowed_token_ids leaves no token that is not banned")
        if self.logit_bias is not None:
            self.logit_bias = _biases(self.logit_bias)

    def _check_processors(self) -> None:
        processors = _listed("logits_processors", self.logits_processors)
        for processor in processors:
            takes_prompt(processor)
        self.logits_processors = processors or None

    def _settle(self) -> None:
        """Bring equal meanings to one form."""
        if self.top_k == -1:
            self.top_k = 0
        if self.seed == -1:
            self.seed = None
        if 0 < self.temperature < MIN_TEMPERATURE:
            logger.warning("temperature %s is raised to %s", self.temperature, MIN_TEMPERATURE)
            self.temperature = MIN_TEMPERATURE
        if self.temperature == 0:
            if self.n > 1:
                raise ParameterError(f"n must be 1 at temperature 0, where all samples are equal; got {self.n}")
            self.top_p, self.top_k, self.min_p = 1.0, 0, 0.0


def resolve_bad_words(params: SamplingParams, encode: Callable[[str], Sequence[int]]) -> SamplingParams:
    """`params` with bad words as token ids. `encode` must add no special tokens.

    As in vLLM, a word is looked up with and without a space before it, the former where it has the same number of
    tokens and begins with another one. Raises ParameterError for a text without tokens.
    """
    words: list[str | list[int]] = []
    for word in params.bad_words:
        if not isinstance(word, str):
            words.append(word)
            continue
        plain, spaced = list(encode(word.lstrip())), list(encode(" " + word.lstrip()))
        if not plain:
            raise ParameterError(f"bad_words: {word!r} has no tokens")
        words.append(plain)
        if spaced and spaced[0] != plain[0] and len(spaced) == len(plain):
            words.append(spaced)
    return msgspec.structs.replace(params, bad_words=words)


def takes_prompt(processor: Any) -> bool:
    """Whether a logits processor is called with the prompt's ids too: where it cannot be called with two arguments.

    Raises ParameterError for what can be called with neither two nor three, or does not tell.
    """
    try:
        signature = inspect.signature(processor)
    except (TypeError, ValueError):
        what = "has no signature" if callable(processor) else "cannot be called"
        raise ParameterError(f"logits_processors: {processor!r:.80} {what}") from None
    for count in (2, 3):
        with suppress(TypeError):
            signature.bind(*[None] * count)
            return count == 3
    raise ParameterError(
        f"logits_processors: {processor!r:.80} must take (output ids, logits) or (prompt ids, output ids, logits), "
        f"it takes {signature}"
    )


def refuse_processors(params: SamplingParams) -> None:
    """Raise ParameterError for logits processors, where the engine is not in this process."""
    if params.logits_processors:
        raise ParameterError(
            "logits_processors cannot go to an engine in another process: use LLM, or logit_bias, allowed_token_ids, "
            "banned_token_ids or bad_words"
        )


def to_row(
    params: SamplingParams, seed: int, eos_token_ids: Sequence[int], sample_index: int = 0, processors: int = 0
) -> SamplingRow:
    """What the sampler needs of one sample. eos_token_ids may not come before min_tokens, even with ignore_eos.
    processors: the number of the request's logits processors, 0 for none.

    Raises ParameterError for bad words that are still text (see `resolve_bad_words`), and where min_tokens would leave
    no allowed token.
    """
    stop_ids = list(dict.fromkeys([*eos_token_ids, *params.stop_token_ids])) if params.min_tokens else []
    banned, bad_words = list(params.banned_token_ids), []
    for word in params.bad_words:
        if isinstance(word, str):
            raise ParameterError(f"bad_words: {word!r} is text, and this model has no tokenizer: give token ids")
        if len(word) == 1:
            banned += word
        else:
            bad_words.append(list(word))
    if params.allowed_token_ids is not None and not set(params.allowed_token_ids).difference(banned, stop_ids):
        raise ParameterError("allowed_token_ids holds no token but bad words and those that min_tokens holds back")
    return SamplingRow(
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        seed=seed,
        logprobs=-1 if params.logprobs is None else params.logprobs,
        prompt_logprobs=-1 if params.prompt_logprobs is None else params.prompt_logprobs,
        sample_index=sample_index,
        min_p=params.min_p,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        repetition_penalty=params.repetition_penalty,
        min_tokens=params.min_tokens,
        stop_ids=stop_ids,
        logit_bias=list((params.logit_bias or {}).items()),
        allowed_ids=params.allowed_token_ids,
        banned_ids=list(dict.fromkeys(banned)),
        bad_words=bad_words,
        processors=processors,
    )


def _check(ok: bool, name: str, value: Any, rule: str) -> None:
    if not ok:
        raise ParameterError(f"{name} must be {rule}, got {value!r}")


def _check_int(name: str, value: Any, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ParameterError(f"{name} must be an integer from {low} to {high}, got {value!r}")


def _finite(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ParameterError(f"{name} must be a finite number, got {value!r}")
    return value


def _listed(name: str, values: Any) -> list[Any]:
    if values is not None and not isinstance(values, (list, tuple, set, frozenset)):
        raise ParameterError(f"{name} must be a list, got {values!r:.80}")
    return list(values or ())


def _ids(name: str, values: Any) -> list[int]:
    """Distinct token ids, in order."""
    ids = _listed(name, values)
    for token in ids:
        _check_int(name, token, 0, _INT31)
    return list(dict.fromkeys(ids)) if name != "bad_words" else ids


def _biases(values: Any) -> dict[int, float]:
    if not isinstance(values, dict):
        raise ParameterError(f"logit_bias must map token ids to numbers, got {values!r:.80}")
    biases = {}
    for token, bias in values.items():
        try:
            token = int(token)  # JSON has text keys only
        except (TypeError, ValueError):
            raise ParameterError(f"logit_bias must be keyed by token ids, got {token!r}") from None
        _check_int("logit_bias", token, 0, _INT31)
        biases[token] = min(MAX_LOGIT_BIAS, max(-MAX_LOGIT_BIAS, float(_finite("logit_bias", bias))))
    return biases
