"""Outputs: text, ids, log-probabilities and reasons do not depend on how a stream of tokens was cut into updates."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest

from tests.seeds import SEED
from tokenspeed.contracts.errors import ParameterError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import RequestOutputKind, SamplingParams
from tokenspeed.contracts.step import TokenLogprobs
from tokenspeed.engine.output import CompletionOutput, OutputBuilder, Progress
from tokenspeed.tokenizer.base import VocabularyTokenizer
from tokenspeed.tokenizer.detokenizer import TokenBytes

TEXTS = [b"a", b"b", b"ab", b"ba", b" ", b"\n\n", "é".encode(), "日本".encode()]
TEXTS += ["€".encode()[:1], "€".encode()[1:2], "€".encode()[2:], b"a\xe2\x82", b"\xacb", b"\xff", b"", b"abab"]
SPECIAL, EOS = len(TEXTS), len(TEXTS) + 1
TEXTS += [b"<s>", b"<eos>"]


class NoEncoder:
    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        raise NotImplementedError


def tokenizer() -> VocabularyTokenizer:
    return VocabularyTokenizer(
        encoder=NoEncoder(),
        token_bytes=TokenBytes(TEXTS.__getitem__, len(TEXTS)),
        vocab_size=len(TEXTS),
        special_ids=frozenset((SPECIAL, EOS)),
        strip_leading_space=False,
        bos_token_id=None,
        eos_token_ids=(EOS,),
        chat_template=None,
        special_tokens={},
    )


def builder(prompt: list[int] | None = None, **fields: Any) -> OutputBuilder:
    request = Request(
        request_id="r",
        prompt_token_ids=prompt or [0],
        params=SamplingParams(**{"max_tokens": None, **fields}),
        seed=1,
        eos_token_ids=[EOS],
    )
    return OutputBuilder(request, None, tokenizer())


def update(ids: list[int], finish: str | None = None, **fields: Any) -> SequenceUpdate:
    return SequenceUpdate(request_id="r", new_token_ids=ids, finish_reason=finish, **fields)


def outcome(completion: CompletionOutput) -> tuple[str, list[int], str | None, int | str | None]:
    return completion.text, completion.token_ids, completion.finish_reason, completion.stop_reason


def expected_outcome(ids: list[int], finish: str, params: SamplingParams) -> tuple[str, list[int], str, str | None]:
    """On the whole, token by token: the text after each token, searched from its start."""
    skip_last = finish == "stop" and not params.include_stop_str_in_output
    shown = ids[:-1] if skip_last else ids
    texts = [""]
    for count in range(1, len(shown) + 1):
        detokenizer = tokenizer().detokenizer([0], params.skip_special_tokens)
        texts.append(detokenizer.push(shown[:count]))
    for count in range(params.min_tokens + 1, len(shown) + 1):
        for end in range(len(texts[count - 1]) + 1, len(texts[count]) + 1):
            for stop in params.stop_strings:
                if texts[count][:end].endswith(stop):
                    cut = end if params.include_stop_str_in_output else end - len(stop)
                    return texts[count][:cut], ids[:count], "stop", stop
    detokenizer = tokenizer().detokenizer([0], params.skip_special_tokens)
    return detokenizer.push(shown) + detokenizer.finish(), ids, finish, None


def random_params(rng: random.Random) -> dict[str, Any]:
    stops = [
        "".join(rng.choices(["a", "b", " ", "é", "€", "\n", "\ufffd", "<s>"], k=rng.randrange(1, 5))) for _ in range(3)
    ]
    return {
        "stop": stops[: rng.randrange(4)],
        "include_stop_str_in_output": rng.random() < 0.5,
        "min_tokens": rng.choice([0, 0, 1, 5]),
        "skip_special_tokens": rng.random() < 0.5,
        "logprobs": 0,
    }


def stream(rng: random.Random, ids: list[int], finish: str) -> list[SequenceUpdate]:
    """Updates of up to four tokens, some empty, the finish with the last tokens."""
    updates, start = [], 0
    while start < len(ids):
        count = rng.randrange(5)
        part = ids[start : start + count]
        start += count
        logprobs = [TokenLogprobs(token, -1.0 - token, 1, [], []) for token in part]
        updates.append(update(part, finish if start >= len(ids) else None, logprobs=logprobs))
    return updates


@pytest.mark.parametrize("seed", [SEED])
def test_any_cutting_gives_the_same_outcome(seed: int) -> None:
    rng = random.Random(seed)
    stopped = 0
    for _ in range(1200):
        fields = random_params(rng)
        ids = [rng.randrange(EOS) for _ in range(rng.randrange(1, 25))]
        finish = rng.choice(["stop", "length", "abort"])
        if finish == "stop":
            ids[-1] = EOS
        expected = expected_outcome(ids, finish, SamplingParams(**fields))
        made = builder(**fields)
        aborts, shown = [], ""
        for each in stream(rng, ids, finish):
            progress = made.update(each)
            aborts.append(progress.abort)
            shown += progress.text
            assert made.output.outputs[0].text == shown
            assert expected[0].startswith(shown), (fields, ids)
        completion = made.output.outputs[0]
        assert outcome(completion) == expected, (fields, ids)
        by_string = isinstance(completion.stop_reason, str)
        assert aborts.count(True) == by_string
        stopped += by_string
        assert completion.logprobs is not None
        assert [list(entry) for entry in completion.logprobs] == [[token] for token in completion.token_ids]
        assert completion.cumulative_logprob == sum(-1.0 - token for token in completion.token_ids)
        assert made.output.finished
    assert stopped > 200


@pytest.mark.parametrize("seed", [SEED])
def test_deltas_join_to_the_whole(seed: int) -> None:
    """Of three samples in turns; nothing is shown twice, and every output that is shown has something new."""
    rng = random.Random(seed)
    for _ in range(200):
        fields = random_params(rng)
        made = builder(n=3, output_kind=RequestOutputKind.DELTA, **fields)
        streams = []
        for index in range(3):
            parts = stream(rng, [rng.randrange(EOS) for _ in range(rng.randrange(1, 20))], "length")
            for part in parts:
                part.index = index
            streams.append(parts)
        joined = [CompletionOutput(index) for index in range(3)]
        last = False
        while any(streams):
            shown = made.update(rng.choice([parts for parts in streams if parts]).pop(0)).shown
            if shown is None:
                continue
            (new,) = shown.outputs
            assert new.text or new.token_ids or new.finish_reason
            joined[new.index].pieces.append(new.text)
            joined[new.index].token_ids += new.token_ids
            assert new.logprobs is not None
            assert len(new.logprobs) == len(new.token_ids)
            joined[new.index].finish_reason, joined[new.index].stop_reason = new.finish_reason, new.stop_reason
            assert not last
            last = shown.finished
        assert last
        assert [outcome(each) for each in joined] == [outcome(each) for each in made.output.outputs]


def test_kinds_show_all_new_or_the_end() -> None:
    seen = {kind: builder(output_kind=kind, stop="b") for kind in RequestOutputKind}
    texts: dict[RequestOutputKind, list[str | None]] = {kind: [] for kind in RequestOutputKind}
    for kind, made in seen.items():
        for each in (update([0]), update([]), update([0, 4]), update([7], "length")):
            shown = made.update(each).shown
            texts[kind].append(None if shown is None else shown.outputs[0].text)
    assert texts == {
        RequestOutputKind.CUMULATIVE: ["a", None, "aa ", "aa 日本"],
        RequestOutputKind.DELTA: ["a", None, "a ", "日本"],
        RequestOutputKind.FINAL_ONLY: [None, None, None, "aa 日本"],
    }


def test_text_is_held_while_it_may_become_a_stop_string() -> None:
    made = builder(stop=["aba", " x"], output_kind=RequestOutputKind.DELTA)
    assert made.update(update([6, 0])).text == "é"
    assert made.update(update([1])).text == ""
    assert made.update(update([1])).text == "abb"
    assert made.update(update([4])).text == ""
    assert made.update(update([0])).text == " "
    last = made.update(update([3, 4, 4]))
    assert (last.text, last.abort) == ("", True)
    assert outcome(made.output.outputs[0]) == ("éabb ", [6, 0, 1, 1, 4, 0, 3], "stop", "aba")
    assert made.update(update([0], "abort")) == Progress(None)
    assert made.output.outputs[0].finish_reason == "stop"


def test_held_text_comes_out_at_the_end() -> None:
    made = builder(stop=["aba"])
    assert made.update(update([0, 1])).text == ""
    assert made.update(update([8], "length")).text == "ab\ufffd"


@pytest.mark.parametrize(
    "fields, ids, text",
    [
        ({}, [0, EOS], "a"),
        ({"skip_special_tokens": False}, [0, SPECIAL, EOS], "a<s>"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, [0, EOS], "a<eos>"),
        ({}, [0, 1], "a"),
        ({"include_stop_str_in_output": True}, [0, 1], "ab"),
        ({"stop": "zz", "include_stop_str_in_output": False}, [0, 1], "a"),
    ],
)
def test_text_of_a_stop_token_is_left_out_unless_asked_for(fields: dict[str, Any], ids: list[int], text: str) -> None:
    made = builder(**fields)
    made.update(update(ids, "stop", stop_reason=ids[-1]))
    assert outcome(made.output.outputs[0]) == (text, ids, "stop", ids[-1])


def test_stop_string_on_the_last_allowed_token_is_a_stop() -> None:
    made = builder(stop="ab")
    assert made.update(update([0, 1], "length")).abort
    assert outcome(made.output.outputs[0]) == ("", [0, 1], "stop", "ab")


def test_without_detokenizing_there_is_no_text() -> None:
    made = builder(detokenize=False)
    assert made.update(update([0, 1], "length")).text == ""
    assert outcome(made.output.outputs[0]) == ("", [0, 1], "length", None)


def test_stop_strings_need_a_tokenizer() -> None:
    request = Request(request_id="r", prompt_token_ids=[1], params=SamplingParams(stop="a"), seed=1)
    with pytest.raises(ParameterError, match="stop needs a tokenizer"):
        OutputBuilder(request, None, None)


def test_samples_share_prompt_metrics_and_end() -> None:
    made = builder(n=2, prompt_logprobs=1, prompt=[0, 1])
    found = TokenLogprobs(1, -0.5, 2, [0], [-0.1])
    made.update(update([], prompt_logprobs=[found], num_cached_tokens=3))
    assert made.output.metrics.first_token_time is None
    made.update(update([2], index=1, num_cached_tokens=9))
    assert made.output.metrics.first_token_time is not None
    made.update(update([0], "length", num_cached_tokens=3))
    output = made.output
    assert not output.finished
    assert output.metrics.finished_time is None
    made.update(update([1], "length", index=1))
    assert output.finished
    assert output.metrics.finished_time is not None
    assert [each.text for each in output.outputs] == ["a", "abb"]
    assert [each.index for each in output.outputs] == [0, 1]
    assert output.num_cached_tokens == 3
    assert output.prompt_logprobs is not None
    first, second = output.prompt_logprobs
    assert first is None
    assert second is not None
    assert {token: (entry.logprob, entry.rank, entry.decoded_token) for token, entry in second.items()} == {
        1: (-0.5, 2, "b"),
        0: (-0.1, 1, "a"),
    }


def test_prompt_logprobs_are_shown_once_as_deltas() -> None:
    made = builder(prompt_logprobs=0, prompt=[0, 1, 2], output_kind=RequestOutputKind.DELTA)
    lengths = []
    for ids, scored in [([], [1]), ([], [2]), ([0], [])]:
        prompt_logprobs = [TokenLogprobs(token, -1.0, 1, [], []) for token in scored]
        shown = made.update(update(ids, prompt_logprobs=prompt_logprobs)).shown
        assert shown is not None
        lengths.append(None if shown.prompt_logprobs is None else len(shown.prompt_logprobs))
    assert lengths == [2, 1, None]


def test_cost_per_token_does_not_grow() -> None:
    """60,000 tokens, one by one; joining the text for each would take minutes."""
    made = builder(stop=["zz", "ab€"], output_kind=RequestOutputKind.DELTA)
    started = time.process_time()
    for number in range(60_000):
        made.update(update([number % 3]))
    assert len(made.output.outputs[0].token_ids) == 60_000
    assert time.process_time() - started < 6
