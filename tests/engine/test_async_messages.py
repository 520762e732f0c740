"""What crosses the socket, and the loop on the engine's side of it."""

from __future__ import annotations

from collections import deque
from typing import Any

import msgspec
import pytest

from tests.engine.async_tools import importable
from tests.engine.fake_core import REFUSED, FakeCore
from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.settings import Setting, settings_of
from tokenspeed.contracts import errors
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import RequestOutputKind, SamplingParams
from tokenspeed.contracts.step import TokenLogprobs
from tokenspeed.engine import loop
from tokenspeed.engine.messages import (
    Abort,
    Changed,
    EngineInfo,
    ErrorInfo,
    Failed,
    Forget,
    FromEngine,
    Loading,
    Profile,
    Profiled,
    Ready,
    Refused,
    Sleep,
    Start,
    Step,
    Stop,
    Submit,
    ToEngine,
    Wake,
)
from tokenspeed.engine.trace import Span

__all__ = ["importable"]
PARAMS = SamplingParams(
    n=3,
    presence_penalty=0.5,
    frequency_penalty=-0.5,
    repetition_penalty=1.25,
    temperature=0.75,
    top_p=0.5,
    top_k=7,
    min_p=0.125,
    seed=2**64 - 1,
    stop=["a", "ü\0"],
    stop_token_ids=[5, 6],
    bad_words=["bad", [1, 2]],
    include_stop_str_in_output=True,
    ignore_eos=True,
    max_tokens=None,
    min_tokens=2,
    logprobs=3,
    prompt_logprobs=4,
    skip_special_tokens=False,
    output_kind=RequestOutputKind.DELTA,
    logit_bias={9: -100.0, 3: 1.5},
    allowed_token_ids=[1, 2, 3],
    banned_token_ids=[4],
)
REQUEST = Request(
    request_id="é", prompt_token_ids=[0, 2**31 - 1], params=PARAMS, seed=2**64 - 1, eos_token_ids=[1], cache_salt="s",
    priority=-3,
)  # fmt: skip
UPDATE = SequenceUpdate(
    request_id="é",
    index=2,
    new_token_ids=[1, 2],
    logprobs=[TokenLogprobs(1, -0.5, 1, [1, 2], [-0.5, float("-inf")])],
    prompt_logprobs=[TokenLogprobs(7, -1.5, 9, [], [])],
    finish_reason="stop",
    stop_reason=2,
    num_cached_tokens=16,
)
INFO = EngineInfo(
    model="m", path="/p", format="gguf", max_model_len=8, vocab_size=9, eos_token_ids=[1],
    sampling_defaults={"top_k": 4, "temperature": 0.5, "stop_token_ids": [3]}, max_num_seqs=2, num_pages=3,
    block_size=4, fallback_ops=["rope"], decode_floor=[(1, 0.25), (8, 0.5)],
)  # fmt: skip


def shape(kind: Any, message: Any) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(message), type=kind)


@pytest.mark.parametrize(
    "message",
    [Submit(REQUEST), Abort("a", 3), Abort("b"), Sleep(), Sleep(2), Wake(), Forget(), Profile(3), Stop()],
    ids=lambda message: type(message).__name__,
)
def test_messages_to_the_engine_round_trip(message: ToEngine) -> None:
    assert shape(ToEngine, message) == message


@pytest.mark.parametrize(
    "message",
    [
        Loading(1, 2**60),
        Ready(INFO),
        Step([UPDATE, SequenceUpdate(request_id="b")], 3, 7, {"running": 2.0}),
        Step([], 0),
        Step([UPDATE], 3, None, {"running": 2.0}, [("a", 0.5), ("b", 0.25)], [1.0, 2.0, 0.5]),
        Refused("a", ErrorInfo("PromptError", "no")),
        Changed(True),
        Profiled([Span("send", 1.5, 0.25, 3, 4)]),
        Changed(False, ErrorInfo("MemoryLimitError", "no")),
        Failed(ErrorInfo("ValueError", "")),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_from_the_engine_round_trip(message: FromEngine) -> None:
    assert shape(FromEngine, message) == message


def another(setting: Setting) -> Any:
    """A value of a setting that is not its default."""
    if setting.about.choices:
        return setting.about.choices[-1]
    return {bool: not setting.default, int: 17, float: 0.5, str: "x\ny"}[setting.kind]


def test_the_first_line_holds_every_setting() -> None:
    changed = {setting.name: another(setting) for setting in settings_of(EngineConfig)}
    changed |= {"precise": False, "trust_remote_code": False}  # one goes with few values of others, one with nothing
    for config in (EngineConfig(), EngineConfig(**changed), EngineConfig(precise=True)):
        line = msgspec.json.encode(Start(fd=7, config=config))
        assert b"\n" not in line
        assert msgspec.json.decode(line, type=Start).config == config


KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_errors_keep_class_and_text(kind: type[errors.TokenSpeedError]) -> None:
    found = shape(ErrorInfo, ErrorInfo.of(kind("prompt of 9, at most 8"))).rebuild()
    assert (type(found), str(found)) == (kind, "prompt of 9, at most 8")
    assert len(KINDS) >= 10


def test_a_bug_becomes_an_engine_error_that_names_it() -> None:
    for kind in (KeyError, type("SystemExit", (Exception,), {})):
        found = ErrorInfo.of(kind("x")).rebuild()
        assert type(found) is errors.EngineDeadError
        assert f"{kind.__name__}: " in str(found)


class RecordedChannel:
    """Hands out what it was given, one list per call, and keeps what is sent."""

    def __init__(self, *inbox: list[ToEngine]) -> None:
        self.inbox, self.sent, self.waits = deque(inbox), [], []  # type: ignore[var-annotated]

    def receive(self, wait: bool) -> list[ToEngine]:
        self.waits.append(wait)
        return self.inbox.popleft() if self.inbox else []

    def send(self, message: FromEngine) -> None:
        self.sent.append(message)


def request(request_id: str, prompt: list[int], max_tokens: int) -> Submit:
    return Submit(
        Request(request_id=request_id, prompt_token_ids=prompt, params=SamplingParams(max_tokens=max_tokens), seed=0)
    )


def serve(*inbox: list[ToEngine]) -> RecordedChannel:
    channel = RecordedChannel(*inbox)
    loop.serve(FakeCore("ok", 0.0), channel)  # type: ignore[arg-type]
    return channel


def test_one_message_per_step_for_all_sequences() -> None:
    channel = serve([request("a", [1, 2], 3), request("b", [4], 2)], [], [], [Stop()])
    steps = [[(update.request_id, update.new_token_ids) for update in step.updates] for step in channel.sent]
    assert steps == [[("a", [1]), ("b", [4])], [("a", [2]), ("b", [4])], [("a", [1])]]
    assert [step.idle_after for step in channel.sent] == [None, None, 2]
    assert [step.num_steps for step in channel.sent] == [1, 2, 3]
    assert channel.sent[-1].stats["running"] == 0


def test_it_waits_for_messages_only_without_work() -> None:
    channel = serve([request("a", [1], 2)], [], [request("b", [1], 9)], [Abort("b")], [Abort("b"), Stop()])
    assert channel.waits == [True, False, True, False, True]


def test_an_idle_engine_tells_so_after_an_abort_without_a_step() -> None:
    channel = serve([request("a", [1], 9)], [Abort("unknown"), Abort("a")], [Stop()])
    assert [step.idle_after for step in channel.sent] == [None, 3]
    assert channel.sent[-1].stats["aborts"] == 1


def test_a_refusal_is_for_one_request() -> None:
    channel = serve([request("a", [REFUSED], 1), request("b", [1], 1)], [Stop()])
    refused, step = channel.sent
    assert (refused.request_id, refused.error.kind) == ("a", "MemoryLimitError")
    assert [update.request_id for update in step.updates] == ["b"]


def test_changes_are_answered_in_order_and_counted() -> None:
    channel = serve([Sleep(), Wake()], [request("a", [1], 1)], [Stop()])
    sleeping, awake, idle, step = channel.sent
    assert (sleeping, awake) == (Changed(True), Changed(False))
    assert (idle.idle_after, step.idle_after) == (2, 3)
    assert [update.request_id for update in step.updates] == ["a"]


def test_steps_without_updates_still_tell_of_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(FakeCore):
        def step(self) -> list[SequenceUpdate]:
            self.counts["steps"] += 1
            return []

    monkeypatch.setattr(loop, "REPORT_S", 0.0)
    channel = RecordedChannel([request("a", [1], 9)], [], [Stop()])
    loop.serve(Slow("ok", 0.0), channel)  # type: ignore[arg-type]
    assert [(step.updates, step.idle_after, step.stats["steps"]) for step in channel.sent] == [
        ([], None, 1),
        ([], None, 2),
    ]
