"""Sequences that give something in place of tokens: they end with their prompt, whatever is beside them."""

from __future__ import annotations

import pytest

from tests.scheduler.test_scheduler import Engine, tokens_of
from tests.scheduler.test_steps_in_flight import Engine as Eager
from tests.seeds import SEED
from tokenspeed.contracts.errors import PromptError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling, ResultRow, StepResult

LAST, MEAN = Pooling("embedding"), Pooling("embedding", mean=True)


def add(engine: Engine | Eager, name: str, prompt: list[int], pooling: Pooling = LAST) -> None:
    request = Request(
        request_id=name, prompt_token_ids=prompt, params=SamplingParams(max_tokens=1), seed=0, pooling=pooling
    )
    engine.scheduler.add(request)


def pooled(updates: list[SequenceUpdate]) -> dict[str, tuple[bytes, str | None, int]]:
    return {each.request_id: (each.pooled, each.finish_reason, each.num_cached_tokens) for each in updates}


@pytest.mark.parametrize("length", [1, 2, 4, 5, 17, 63, 64])
@pytest.mark.parametrize("pooling", [LAST, MEAN], ids=["last", "mean"])
def test_it_ends_with_its_prompt(length: int, pooling: Pooling) -> None:
    engine = Engine(budget=5, max_len=64)
    prompt = [(SEED + 7 * i) % 50 for i in range(length)]
    add(engine, "a", prompt, pooling)
    (update,) = engine.drain()
    assert (update.new_token_ids, update.finish_reason, update.stop_reason) == ([], "stop", None)
    assert update.pooled == bytes(prompt if pooling.mean else prompt[-1:])
    assert sum(count for rows in engine.fed() for _, count in rows) == length
    assert (len(engine.plans) > 1) == (length > 5)


def test_a_prompt_may_fill_the_model_and_no_more() -> None:
    engine = Engine(max_len=16)
    add(engine, "a", list(range(16)))
    with pytest.raises(PromptError, match=r"the prompt has 17 tokens, max_model_len 16 allows 15 .* or 16 and none"):
        add(engine, "b", list(range(17)))
    assert pooled(engine.drain()) == {"a": (bytes([15]), "stop", 0)}


def test_only_the_last_token_needs_no_others_to_be_computed() -> None:
    """A mean would lack the hidden states of what the cache holds; what it computes is there for others."""
    engine = Engine()
    prompt = list(range(19))
    add(engine, "mean", prompt, MEAN)
    assert pooled(engine.drain()) == {"mean": (bytes(prompt), "stop", 0)}
    add(engine, "last", prompt)
    assert pooled(engine.drain()) == {"last": (bytes([18]), "stop", 16)}
    add(engine, "again", prompt, MEAN)
    assert pooled(engine.drain()) == {"again": (bytes(prompt), "stop", 0)}
    engine.add("text", prompt, max_tokens=1)
    assert engine.drain()[0].num_cached_tokens == 16


def test_beside_completions() -> None:
    engine = Engine(budget=8)
    engine.add("a", 10, max_tokens=6)
    for number in range(5):
        add(engine, f"p{number}", [number] * (3 * number + 1), MEAN if number % 2 else LAST)
    updates = engine.drain()
    assert tokens_of(updates, "a") == list(range(1010, 1016))
    found = {name: value for name, (value, _, _) in pooled(updates).items() if name != "a"}
    assert found == {f"p{n}": bytes([n] * (3 * n + 1) if n % 2 else [n]) for n in range(5)}


def test_a_mean_that_lost_its_pages_is_summed_anew() -> None:
    engine = Eager(num_pages=11, budget=8)
    prompt = list(range(30))
    engine.add("first", 12, max_tokens=12)
    engine.launch()
    engine.collect()
    add(engine, "mean", prompt, MEAN)
    updates: list[SequenceUpdate] = []
    while engine.launch():
        updates += engine.collect()
    assert engine.preemptions == 1
    assert pooled(updates)["mean"] == (bytes(prompt), "stop", 0)
    engine.cache.check_idle()


def test_abort() -> None:
    engine = Engine(budget=4)
    add(engine, "a", list(range(30)), MEAN)
    engine.step()
    (update,) = engine.scheduler.abort("a")
    assert (update.finish_reason, update.pooled) == ("abort", b"")
    assert not engine.scheduler.has_work
    engine.cache.check_idle()


@pytest.mark.parametrize("row", [ResultRow(0, 3, []), ResultRow(0, 3, [5]), ResultRow(0, 2, [], pooled=b"1234")])
def test_a_result_that_does_not_fit(row: ResultRow) -> None:
    """None at the end, and something before it."""
    engine = Engine(budget=8)
    add(engine, "a", [1, 2, 3])
    plan = engine.plan()
    assert [(each.slot, each.max_tokens) for each in plan.rows] == [(0, 3)]
    with pytest.raises(RuntimeError, match="slot 0"):
        engine.scheduler.update(StepResult(plan.step_id, [row]))
