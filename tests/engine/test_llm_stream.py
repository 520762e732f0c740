"""`LLM.stream`: pieces of text, several streams at once, and streams that are dropped."""

from __future__ import annotations

import pytest

from tests.engine.test_llm import GREEDY, random_ids, run
from tokenspeed.contracts.errors import PromptError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM

LONG = SamplingParams(temperature=0, max_tokens=40)


def test_pieces_add_up_to_the_text(demo_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=12)
    pieces, counts = [], []
    for text, output in demo_llm.stream("Wie schön: 你好 means", params):
        pieces.append(text)
        counts.append(len(output.outputs[0].token_ids))
    (whole,) = demo_llm.generate("Wie schön: 你好 means", params, use_tqdm=False)
    assert counts == list(range(1, 13))
    assert "".join(pieces) == whole.outputs[0].text == output.outputs[0].text
    assert output.finished
    assert output.outputs[0].token_ids == whole.outputs[0].token_ids


@pytest.mark.parametrize("steps", [0, 1, 5])
def test_a_dropped_stream_frees_its_pages(llm: LLM, steps: int) -> None:
    (ids,) = random_ids(40, 33)
    stream = llm.stream(ids, LONG)
    output = None
    for _ in range(steps):
        _, output = next(stream)
    assert llm.core.has_work
    del stream
    assert not llm.core.has_work
    llm.core.cache.check_idle()
    if output is not None:
        assert output.outputs[0].finish_reason == "abort"
        assert len(output.outputs[0].token_ids) == steps
    assert len(run(llm, [ids], GREEDY)[0]) == 6


def test_streams_in_turns_and_a_batch_between(llm: LLM) -> None:
    first, second, third = random_ids(41, 20, 7, 12)
    alone = run(llm, [first, second, third], LONG)
    streams = [llm.stream(first, LONG), llm.stream(second, LONG)]
    outputs = [[next(stream)[1] for stream in streams] for _ in range(3)][-1]
    assert run(llm, [third], LONG) == alone[2:]
    for stream in streams:
        for _ in stream:
            pass
    assert [output.outputs[0].token_ids for output in outputs] == alone[:2]


def test_a_stream_that_another_call_finished_still_gives_all_its_text(demo_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    stream = demo_llm.stream("One, two,", params)
    text, output = next(stream)
    pieces = [text]
    demo_llm.generate("Three, four,", SamplingParams(temperature=0, max_tokens=8), use_tqdm=False)
    pieces += [text for text, _ in stream]
    assert len(pieces) == 2
    assert "".join(pieces) == output.outputs[0].text
    assert len(output.outputs[0].token_ids) == 4


def test_a_bad_prompt_is_refused_before_the_first_piece(llm: LLM) -> None:
    with pytest.raises(PromptError, match="999"):
        llm.stream([999])


@pytest.mark.parametrize("where", ["launch", "_run"])
def test_a_step_that_fails_ends_every_request_and_the_next_call_works(
    llm: LLM, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    ids = random_ids(43, 25, 9)
    expected = run(llm, ids, GREEDY)
    llm.core.cache.reset()
    paused = llm.stream(ids[0], LONG)
    _, output = next(paused)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.core.executor, where, fail)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompt_token_ids=ids[1:], sampling_params=LONG, use_tqdm=False)
    assert not llm.core.has_work
    llm.core.cache.check_idle()
    assert output.outputs[0].finish_reason == "abort"
    assert len(list(paused)) == 1
    assert run(llm, ids, GREEDY) == expected


def test_an_interrupted_batch_leaves_nothing_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = random_ids(42, 5, 9)
    steps = iter(range(3))
    real = llm.core.step

    def step():
        if next(steps, None) is None:
            raise KeyboardInterrupt
        return real()

    with monkeypatch.context() as patch:
        patch.setattr(llm.core, "step", step)
        with pytest.raises(KeyboardInterrupt):
            llm.generate(prompt_token_ids=ids, sampling_params=LONG, use_tqdm=False)
    llm.core.cache.check_idle()
    assert len(run(llm, ids, GREEDY)[1]) == 6
