"""SamplingParams: what is refused, what is brought to one form, and the row that the sampler gets."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import msgspec
import pytest

from tokenspeed.contracts.errors import ParameterError
from tokenspeed.contracts.sampling import (
    RequestOutputKind,
    SamplingParams,
    refuse_processors,
    resolve_bad_words,
    takes_prompt,
    to_row,
)
from tokenspeed.contracts.step import SamplingRow

EVERY_FIELD: dict[str, Any] = {
    "n": 3,
    "presence_penalty": -2.0,
    "frequency_penalty": 2,
    "repetition_penalty": 0.1,
    "temperature": 0.7,
    "top_p": 0.5,
    "top_k": 12,
    "min_p": 0.25,
    "seed": 2**64 - 1,
    "stop": ["a", "bc"],
    "stop_token_ids": [7, 8],
    "bad_words": [[4], [5, 6]],
    "include_stop_str_in_output": True,
    "ignore_eos": True,
    "max_tokens": 9,
    "min_tokens": 9,
    "logprobs": 0,
    "prompt_logprobs": 64,
    "skip_special_tokens": False,
    "output_kind": RequestOutputKind.DELTA,
    "logit_bias": {3: -5.0},
    "allowed_token_ids": [0, 2, 7],
    "banned_token_ids": [2],
}


@pytest.mark.parametrize(
    "fields, complaint",
    [
        ({"n": 0}, "n must be an integer from 1 to 16384, got 0"),
        ({"n": 16385}, "16384"),
        ({"n": True}, "n must be"),
        ({"n": 2, "temperature": 0}, "n must be 1 at temperature 0"),
        ({"presence_penalty": 2.1}, r"presence_penalty must be in \[-2, 2\], got 2.1"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"frequency_penalty": "1"}, "frequency_penalty must be a finite number"),
        ({"repetition_penalty": 0}, r"repetition_penalty must be at least 1e-06 and at most 1e\+06, got 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty"),
        ({"repetition_penalty": 1e39}, "repetition_penalty must be"),
        ({"temperature": -0.1}, r"temperature must be at least 0 and at most 1e\+06, got -0.1"),
        ({"temperature": 1e39}, r"temperature must be at least 0 and at most 1e\+06, got 1e\+39"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"top_p": 0}, r"top_p must be in \(0, 1\], got 0"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k must be an integer from -1"),
        ({"top_k": 2.0}, "top_k"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\]"),
        ({"min_p": 1.1}, "min_p"),
        ({"seed": 2**64}, "seed"),
        ({"seed": 1.5}, "seed"),
        ({"stop": ""}, "stop must be texts that are not empty"),
        ({"stop": ["a", 3]}, "stop"),
        ({"stop": 3}, "stop must be a list"),
        ({"stop": "a", "detokenize": False}, "stop needs detokenize"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids"),
        ({"bad_words": [" "]}, "bad_words"),
        ({"bad_words": [[]]}, "bad_words must be sequences"),
        ({"bad_words": [3]}, "bad_words must be a list"),
        ({"bad_words": "word"}, "bad_words must be a list"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false"),
        ({"detokenize": None}, "detokenize"),
        ({"include_stop_str_in_output": "yes"}, "include_stop_str_in_output"),
        ({"spaces_between_special_tokens": False}, "spaces_between_special_tokens=False is not supported"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 6, "max_tokens": 5}, "min_tokens is 6, above max_tokens 5"),
        ({"logprobs": -1}, "logprobs must be an integer from 0 to 64"),
        ({"logprobs": 65}, "logprobs"),
        ({"prompt_logprobs": 65}, "prompt_logprobs"),
        ({"output_kind": 7}, "output_kind must be one of CUMULATIVE, DELTA, FINAL_ONLY"),
        ({"logit_bias": [1]}, "logit_bias must map"),
        ({"logit_bias": {"x": 1}}, "logit_bias must be keyed by token ids, got 'x'"),
        ({"logit_bias": {-1: 1}}, "logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias must be a finite number"),
        ({"allowed_token_ids": []}, "allowed_token_ids leaves no token"),
        ({"allowed_token_ids": [1, 2], "banned_token_ids": [2, 1, 0]}, "allowed_token_ids leaves no token"),
        ({"banned_token_ids": [2**31]}, "banned_token_ids"),
        ({"logits_processors": lambda ids, logits: logits}, "logits_processors must be a list, got <function"),
        ({"logits_processors": [3]}, "logits_processors: 3 cannot be called"),
        ({"logits_processors": [lambda logits: logits]}, r"must take \(output ids, logits\) or .* it takes \(logits\)"),
        ({"logits_processors": [lambda a, b, c, d: d]}, r"it takes \(a, b, c, d\)"),
        ({"logits_processors": [dict.fromkeys, dict]}, "logits_processors: <class 'dict'> has no signature"),
    ],
    ids=lambda value: value if isinstance(value, str) else ",".join(value),
)
def test_refused(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ParameterError, match=complaint):
        SamplingParams.from_dict(fields)


@pytest.mark.parametrize(
    "name", ["best_of", "use_beam_search", "structured_outputs", "logits_processor", "tempreature"]
)
def test_unknown_names_are_refused_by_name(name: str) -> None:
    with pytest.raises(ParameterError, match=f"{name}.*supported: n, presence_penalty"):
        SamplingParams.from_dict({"top_k": 3, name: 1})
    with pytest.raises(TypeError, match=name):
        SamplingParams(**{name: 1})  # type: ignore[arg-type]


def test_equal_meanings_have_one_form(caplog: pytest.LogCaptureFixture) -> None:
    assert SamplingParams(top_k=-1) == SamplingParams()
    assert SamplingParams(seed=-1).seed is None
    assert SamplingParams(stop="end") == SamplingParams(stop=["end", "end"])
    assert SamplingParams(stop=None, stop_token_ids=None, bad_words=None) == SamplingParams()  # type: ignore[arg-type]
    assert SamplingParams(stop_token_ids=[3, 1, 3]).stop_token_ids == [3, 1]
    assert SamplingParams(temperature=0, top_k=5, top_p=0.5, min_p=0.5) == SamplingParams(temperature=0)
    assert SamplingParams(logit_bias={"5": 200, 6: -200.0}).logit_bias == {5: 100.0, 6: -100.0}  # type: ignore[dict-item]
    assert SamplingParams(output_kind=1).output_kind is RequestOutputKind.DELTA  # type: ignore[arg-type]
    assert not caplog.records
    assert SamplingParams(temperature=1e-6).temperature == 0.01
    assert "raised to 0.01" in caplog.text


def test_limits_are_allowed_and_survive_bytes() -> None:
    params = SamplingParams.from_dict(EVERY_FIELD)
    for name, value in EVERY_FIELD.items():
        assert getattr(params, name) == value
    others = {"detokenize", "spaces_between_special_tokens", "logits_processors"}
    assert set(EVERY_FIELD) | others == set(SamplingParams.__struct_fields__)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
    assert params.token_ids() == {
        "stop_token_ids": [7, 8],
        "logit_bias": [3],
        "allowed_token_ids": [0, 2, 7],
        "banned_token_ids": [2],
        "bad_words": [4, 5, 6],
    }


def test_row_of_every_field() -> None:
    row = to_row(SamplingParams.from_dict(EVERY_FIELD), seed=11, eos_token_ids=[1, 8], sample_index=2)
    assert row == SamplingRow(
        temperature=0.7,
        top_k=12,
        top_p=0.5,
        seed=11,
        logprobs=0,
        prompt_logprobs=64,
        sample_index=2,
        min_p=0.25,
        presence_penalty=-2.0,
        frequency_penalty=2,
        repetition_penalty=0.1,
        min_tokens=9,
        stop_ids=[1, 8, 7],
        logit_bias=[(3, -5.0)],
        allowed_ids=[0, 2, 7],
        banned_ids=[2, 4],
        bad_words=[[5, 6]],
    )


def test_row_of_defaults_is_small() -> None:
    row = to_row(SamplingParams(stop_token_ids=[5]), seed=1, eos_token_ids=[2])
    assert row == SamplingRow(1.0, 0, 1.0, 1)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(row), type=SamplingRow) == row


class Callable3:
    def __call__(self, prompt: list[int], output: list[int], logits: Any) -> Any:
        return logits

    def two(self, output: list[int], logits: Any, scale: float = 1.0) -> Any:
        return logits


@pytest.mark.parametrize(
    "processor, with_prompt",
    [
        (lambda output, logits: logits, False),
        (lambda prompt, output, logits: logits, True),
        (lambda *ids_and_logits: None, False),
        (lambda output, logits, *, scale=2: logits, False),
        (Callable3(), True),
        (Callable3().two, False),
        (partial(Callable3(), [1]), False),
        (sum, False),
    ],
)
def test_how_a_logits_processor_is_called(processor: Any, with_prompt: bool) -> None:
    assert takes_prompt(processor) == with_prompt
    params = SamplingParams(logits_processors=[processor], bad_words=[[1, 2]])
    assert resolve_bad_words(params, lambda text: [0]).logits_processors == [processor]
    with pytest.raises(ParameterError, match="logits_processors cannot go to an engine in another process: use LLM"):
        refuse_processors(params)
    refuse_processors(SamplingParams(logits_processors=[]))
    assert to_row(params, 1, [], processors=7).processors == 7


def test_min_tokens_that_leaves_nothing_is_refused() -> None:
    params = SamplingParams(allowed_token_ids=[4, 5], bad_words=[[5]], min_tokens=1)
    to_row(params, 0, [3])
    with pytest.raises(ParameterError, match="allowed_token_ids"):
        to_row(params, 0, [3, 4])


def test_bad_words_become_token_sequences() -> None:
    table = {
        "cat": [1],
        " cat": [2],
        "dog": [3, 4],
        " dog": [9, 3, 4],
        "cow": [5, 6],
        " cow": [5, 7],
        "?": [],
        " ?": [8],
    }
    params = SamplingParams(bad_words=["cat", " dog", [1, 2, 1], "cow"], top_k=3)
    with pytest.raises(ParameterError, match="'cat' is text"):
        to_row(params, 0, [])
    resolved = resolve_bad_words(params, table.__getitem__)
    assert resolved.bad_words == [[1], [2], [3, 4], [1, 2, 1], [5, 6]]
    assert resolved.top_k == 3
    row = to_row(resolved, 0, [])
    assert (row.banned_ids, row.bad_words) == ([1, 2], [[3, 4], [1, 2, 1], [5, 6]])
    with pytest.raises(ParameterError, match="'\\?' has no tokens"):
        resolve_bad_words(SamplingParams(bad_words=["?"]), table.__getitem__)
