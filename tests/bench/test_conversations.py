"""Conversations with a server that remembers: every turn holds all that was said, and the counts are the server's."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from tests.bench.stub_server import Remembering, done, flat, running
from tests.seeds import SEED
from tokenspeed.bench.conversations import Conversations
from tokenspeed.bench.serve import Run
from tokenspeed.bench.serve_report import report
from tokenspeed.bench.workload import ApiName, Lengths, Workload
from tokenspeed.contracts.errors import ConfigError

KINDS: list[tuple[ApiName, bool]] = [("chat", False), ("completions", False), ("completions", True)]


def hold(
    stub: Remembering, api: ApiName, token_ids: bool, *, model: str = "m", seed: int = SEED, **settings: Any
) -> Run:
    work = Workload(api, model, Lengths(9, 12), Lengths(1, 5), seed)
    chosen: dict[str, Any] = {
        "count": 5,
        "concurrency": 2,
        "turns": Lengths(2, 4),
        "turn_len": Lengths(4, 6),
    } | settings
    with running(stub) as url:
        return done(Conversations(work, token_ids=token_ids, **chosen), url)


def chains(stub: Remembering) -> list[list[Any]]:
    """The bodies of each conversation, by turn: each prompt begins with the one before and its answer."""
    found: list[list[Any]] = []
    for body in stub.bodies:
        said = [chain for chain in found if follows(stub, chain[-1], body)]
        assert len(said) <= 1
        if said:
            said[0].append(body)
        else:
            found.append([body])
    return found


def follows(stub: Remembering, earlier: Any, later: Any) -> bool:
    whole = flat(earlier) + (["<assistant>"] if "messages" in earlier else []) + stub.said[id(earlier)]
    return flat(later)[: len(whole)] == whole


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("api, token_ids", KINDS)
def test_each_turn_sends_what_was_said(api: ApiName, token_ids: bool, seed: int) -> None:
    stub = Remembering()
    run = hold(stub, api, token_ids, seed=seed)
    assert {request.error for request in run.requests} == {None}
    assert len(stub.bodies) == len(run.requests)
    held = chains(stub)
    assert len(held) == 5
    heads = 1 if api == "chat" else 0
    for chain in held:
        assert 2 <= len(chain) <= 4
        assert 9 <= len(flat(chain[0])) - heads <= 12
        for earlier, later in pairwise(chain):
            said = len(flat(earlier)) + heads + len(stub.said[id(earlier)])
            assert 4 <= len(flat(later)) - said - heads <= 6
            assert len(stub.said[id(earlier)]) == earlier["max_tokens"]
    assert {len(part.requests) for part in run.parts} <= set(range(1, 6))
    for turn, part in enumerate(run.parts):
        assert part.name == f"turn{turn + 1}"
        bodies = [chain[turn] for chain in held if len(chain) > turn]
        counted = sorted((*stub.counted[id(body)], body["max_tokens"]) for body in bodies)
        assert sorted((r.prompt_tokens, r.cached_tokens, r.output_tokens) for r in part.requests) == counted


@pytest.mark.parametrize("api, token_ids", KINDS)
def test_all_but_what_was_added_is_cached(api: ApiName, token_ids: bool) -> None:
    stub = Remembering()
    run = hold(stub, api, token_ids)
    for chain in chains(stub):
        for earlier, later in pairwise(chain):
            assert stub.counted[id(later)][1] >= stub.counted[id(earlier)][0] + earlier["max_tokens"]
    for part, figures in zip(run.parts, report(run).parts, strict=True):
        total = sum(request.prompt_tokens for request in part.requests)
        assert figures.cached_share == pytest.approx(sum(r.cached_tokens for r in part.requests) / total)
        assert figures.input_tokens == pytest.approx(total / len(part.requests))
        assert figures.requests == len(part.requests)


def test_messages_alternate_and_hold_the_answers() -> None:
    stub = Remembering()
    hold(stub, "chat", False, count=1, turns=Lengths(3, 3))
    last = stub.bodies[-1]["messages"]
    assert [each["role"] for each in last] == ["user", "assistant", "user", "assistant", "user"]
    assert [each["content"].split() for each in last[1::2]] == [stub.said[id(body)] for body in stub.bodies[:2]]
    assert all("return_token_ids" not in body for body in stub.bodies)


@pytest.mark.parametrize("seed", [SEED])
def test_the_same_seed_asks_the_same_however_many_at_once(seed: int) -> None:
    one, three = Remembering(), Remembering()
    hold(one, "chat", False, seed=seed, concurrency=1)
    hold(three, "chat", False, seed=seed, concurrency=3)
    assert one.most_running == 1

    def asked(stub: Remembering) -> list[list[str]]:
        return sorted([each["content"] for each in body["messages"][::2]] for body in stub.bodies)

    assert asked(one) == asked(three)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_under_way_than_asked_for(concurrency: int) -> None:
    stub = Remembering()
    hold(stub, "chat", False, count=7, concurrency=concurrency)
    assert stub.most_running <= concurrency
    assert len(chains(stub)) == 7


@pytest.mark.parametrize("api, token_ids", KINDS)
def test_a_server_that_forgets_is_found_out(api: ApiName, token_ids: bool) -> None:
    stub = Remembering()
    run = hold(stub, api, token_ids, model="forgetful", count=3, turns=Lengths(4, 4))
    assert len(stub.bodies) == 6, "a conversation ends with the turn that fails"
    assert sum(request.error is None for request in run.requests) == 3
    errors = [request.error for request in run.parts[1].requests]
    assert all(error is not None and "prompt_tokens grew by 0" in error for error in errors)


def test_ids_must_come_where_they_are_asked_for() -> None:
    stub = Remembering()
    (request,) = hold(stub, "completions", True, model="no-ids", count=1).requests
    assert request.error is not None
    assert "--token-ids needs a server" in request.error


def test_what_is_not_told_is_not_zero() -> None:
    found = report(hold(Remembering(), "chat", False, model="secretive"))
    assert [part.cached_share for part in found.parts] == [None] * len(found.parts)


def test_time_to_think() -> None:
    run = hold(Remembering(), "chat", False, count=1, turns=Lengths(3, 3), think_s=0.05)
    for earlier, later in pairwise(run.requests):
        assert later.sent - earlier.ended >= 0.049


@pytest.mark.parametrize(
    "api, settings, complaint",
    [
        ("chat", {"token_ids": True}, "--token-ids needs --api completions"),
        ("chat", {"concurrency": 0}, "--concurrency must be at least 1"),
        ("chat", {"think_s": -1.0}, "--think-time must be at least 0"),
        ("chat", {"think_s": float("inf")}, "--think-time must be at least 0"),
    ],
)
def test_conversations_that_are_none(api: ApiName, settings: dict[str, Any], complaint: str) -> None:
    work = Workload(api, "m", Lengths(1, 1), Lengths(1, 1))
    chosen: dict[str, Any] = {"concurrency": 1, "turns": Lengths(1, 1), "turn_len": Lengths(1, 1)} | settings
    with pytest.raises(ConfigError, match=complaint):
        Conversations(work, 1, **chosen)
