"""The GPU runner's KV memory on a driver that is not there: measured, asleep, and awake again under the same graphs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton.gpu_fakes import SETTINGS
from tests.kernels.triton.test_gpu_executor import PLAIN, SLOW, Opened, open_gpu, tiny
from tests.runner.cuda_fake import FakeCard, FakeCuda
from tokenspeed.contracts.errors import DeviceError, EngineAsleepError, EngineBusyError, MemoryLimitError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.runner import build, jobs, room
from tokenspeed.runner.gpu import largest_step

__all__ = ["open_gpu", "tiny"]
GIB = 2**30
PROMPTS = [[1, 5, 9], [1, *range(3, 30)], [1, 7]]
GREEDY = [SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)] * 3
KINDS: Any = [PLAIN[0], PLAIN[2], SLOW[1]]
MIXED = [SamplingParams(max_tokens=8, ignore_eos=True, **kind) for kind in KINDS]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> FakeCard:
    card = FakeCard(FakeCuda(total=4 * GIB))
    monkeypatch.setattr(build, "open_card", lambda device: card)
    return card


def run(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    outputs = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def reference(path: Path, params: list[SamplingParams], monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Tokens without a card."""
    with monkeypatch.context() as patch:
        patch.setattr(build, "open_card", lambda device: None)
        return run(LLM(str(path), **SETTINGS), params)


def page_bytes(llm: LLM) -> int:
    return llm.core.page_shape.page_bytes


def test_asleep_the_pages_are_gone_and_awake_all_is_as_before(
    tiny: Path, open_gpu: Callable[..., Opened], card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, link = open_gpu()
    wanted = reference(tiny, MIXED, monkeypatch)
    assert run(gpu, MIXED) == wanted
    assert run(gpu, GREEDY) == run(gpu, GREEDY)
    executor: Any = gpu.core.executor
    graphs, address, used = list(link.graphs), executor._arena.kv.data_ptr(), 4 * GIB - card.cuda.free
    replays = sum(graph.replays for graph in graphs)
    assert gpu.core.cache.num_cached_pages > 0
    assert used >= gpu.core.capacity.num_pages * page_bytes(gpu)
    for _ in range(2):
        gpu.sleep()
        gpu.sleep()
        assert gpu.is_sleeping()
        assert card.cuda.free == 4 * GIB
        assert gpu.core.cache.num_cached_pages == 0
        with pytest.raises(EngineAsleepError, match="wake_up"):
            run(gpu, MIXED)
        gpu.wake_up()
        gpu.wake_up()
        assert not gpu.is_sleeping()
        assert (card.cuda.free, executor._arena.kv.data_ptr()) == (4 * GIB - used, address)
        assert run(gpu, MIXED) == wanted
    assert link.graphs[: len(graphs)] == graphs
    assert sum(graph.replays for graph in graphs) > replays > 0
    gpu.core.cache.check_idle()
    gpu.close()
    assert card.cuda.leaks() == []


def test_steps_of_a_request_that_left_are_over_before_the_pages_go(
    open_gpu: Callable[..., Opened], card: FakeCard
) -> None:
    gpu, link = open_gpu()
    stream = gpu.stream({"prompt_token_ids": [1, 2, 3]}, GREEDY[0])
    next(stream)
    with pytest.raises(EngineBusyError, match="1 requests are under way"):
        gpu.sleep()
    assert not gpu.is_sleeping()
    del stream
    assert gpu.core.has_work
    waits = link.waits
    gpu.sleep()
    assert link.waits > waits
    assert not gpu.core.has_work
    gpu.wake_up()
    assert len(run(gpu, GREEDY)) == 3


def test_who_finds_no_memory_sleeps_on(open_gpu: Callable[..., Opened], card: FakeCard) -> None:
    gpu, _ = open_gpu()
    before = run(gpu, GREEDY)
    gpu.sleep()
    card.cuda.others = 4 * GIB - 10_000
    with pytest.raises(MemoryLimitError, match=r"cuMemCreate .* \(10000 of"):
        gpu.wake_up()
    assert gpu.is_sleeping()
    assert card.cuda.free == 10_000
    with pytest.raises(EngineAsleepError):
        run(gpu, GREEDY)
    card.cuda.others = 0
    gpu.wake_up()
    assert run(gpu, GREEDY) == before


@pytest.mark.parametrize("name, failing", [("cuMemUnmap", 2), ("cuMemRelease", 2), ("cuCtxSynchronize", 1)])
def test_a_driver_that_fails_while_it_falls_asleep(
    open_gpu: Callable[..., Opened], card: FakeCard, monkeypatch: pytest.MonkeyPatch, name: str, failing: int
) -> None:
    gpu, _ = open_gpu()
    before = run(gpu, GREEDY)
    plain, calls = getattr(card.cuda, name), itertools.count(1)

    def one_fails(*arguments: Any) -> Any:
        return (card.cuda.CUresult.CUDA_ERROR_UNKNOWN,) if next(calls) == failing else plain(*arguments)

    one_fails.__name__ = name
    monkeypatch.setattr(card.cuda, name, one_fails)
    with pytest.raises(DeviceError, match=name):
        gpu.sleep()
    assert gpu.is_sleeping()  # not to be used as it is
    gpu.wake_up()
    assert run(gpu, GREEDY) == before
    gpu.sleep()
    assert card.cuda.free == 4 * GIB


def test_the_largest_step_is_run_before_the_cache_is_sized(
    open_gpu: Callable[..., Opened], card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """2 MiB are still taken when it is over: what is left after it counts."""
    monkeypatch.setattr(room, "MARGIN_BYTES", 2**20)
    card.cuda.total = 64 * 2**20
    launched: list[list[tuple[int, int]]] = []
    rooms: list[room.Room] = []

    def measured(executor: Any, *rest: Any) -> None:
        launch = executor.launch

        def counted(plan: Any) -> Any:
            launched.append([(row.max_tokens, plan.delta.new[row.slot].sampling.prompt_logprobs) for row in plan.rows])
            return launch(plan)

        executor.launch = counted
        largest_step.run_largest_steps(executor, *rest)
        card.cuda.others += 2 * 2**20

    def shared(use: room.CardUse, config: Any) -> room.Room:
        rooms.append(room.share_of_card(use, config))
        return rooms[-1]

    monkeypatch.setattr(build, "run_largest_steps", measured)
    monkeypatch.setattr(build, "share_of_card", shared)
    gpu, link = open_gpu(max_num_batched_tokens=19)
    # Four rows with 19 tokens between them, eagerly and captured; then one that scores.
    packed = gpu.core.model.packed.values()
    assert {s.data.device.type for weight in packed for s in weight.segments} == {"meta"}  # the backend has its own
    assert launched == [[(5, -1), (5, -1), (5, -1), (4, -1)]] * 2 + [[(19, 0)]]
    assert [graph.replays for graph in link.graphs] == [1]
    before, after = (found.cache_bytes for found in rooms)
    logits = 97 * 4 * (1 + 2 + 4 * 4 + 1 + 2 + 4 + 4)  # of buckets to 32 mixed, to 4 decoding; counts of 4 slots
    assert before == int(0.9 * 64 * 2**20)
    assert after == before - 2 * 2**20 - logits
    assert card.cuda.free >= 2**20
    assert run(gpu, GREEDY) == run(gpu, GREEDY)


@pytest.mark.parametrize("at_once", [1, 3, 27])
def test_prompts_are_scored_a_few_tokens_at_a_time(
    tiny: Path, open_gpu: Callable[..., Opened], monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    asked: dict[str, Any] = {"prompt_token_ids": PROMPTS, "sampling_params": MIXED, "use_tqdm": False}
    wanted = LLM(str(tiny), **SETTINGS).generate(**asked)
    monkeypatch.setattr(jobs, "LOGITS_BYTES", at_once * 97 * 4)
    gpu, _ = open_gpu()
    for found, expected in zip(gpu.generate(**asked), wanted, strict=True):
        assert found.outputs[0].token_ids == expected.outputs[0].token_ids
        assert (found.prompt_logprobs is None) == (expected.prompt_logprobs is None)
        for mine, theirs in zip(found.prompt_logprobs or (), expected.prompt_logprobs or (), strict=True):
            assert list(mine or ()) == list(theirs or ())
            for token, entry in (mine or {}).items():
                assert entry.logprob == pytest.approx((theirs or {})[token].logprob, abs=1e-4)


def test_a_size_that_is_asked_for_is_not_measured(open_gpu: Callable[..., Opened], card: FakeCard) -> None:
    gpu, link = open_gpu(kv_cache_memory_bytes=100_000)
    assert link.graphs == []
    assert gpu.core.capacity.num_pages == 100_000 // page_bytes(gpu)
    with pytest.raises(
        MemoryLimitError, match=r"--kv-cache-memory-bytes .* is more than \d+: \d+ bytes are free on the"
    ):
        open_gpu(kv_cache_memory_bytes=4 * GIB)


def test_fewer_pages_than_all_sequences_want_let_fewer_run_at_once(
    tiny: Path, open_gpu: Callable[..., Opened], card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """32 pages hold one sequence of the model's whole context; the three want 35 together."""
    monkeypatch.setattr(room, "MARGIN_BYTES", 0)
    page = 4 * 2 * 2 * 2 * 8 * 4
    later = 97 * 4 * (1 + 2 + 4 * 3 + 1 + 2 + 4 + 4)
    card.cuda.total = math.ceil((32 * page + later) / 0.9)
    gpu, _ = open_gpu()
    assert page_bytes(gpu) == page
    assert (gpu.core.capacity.num_pages, gpu.core.capacity.max_model_len) == (32, 128)
    params = [SamplingParams(temperature=0, max_tokens=34 + i, ignore_eos=True) for i in range(3)]
    assert run(gpu, params) == reference(tiny, params, monkeypatch)
    gpu.core.cache.check_idle()


def test_a_length_that_does_not_fit_is_refused_with_numbers(
    open_gpu: Callable[..., Opened], card: FakeCard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "MARGIN_BYTES", 0)
    card.cuda.total = 25_000
    with pytest.raises(MemoryLimitError, match=r"sequence of 128 tokens needs 0\.0 MiB; .*--gpu-memory-utilization"):
        open_gpu(max_model_len=128)
    card.cuda.others = 25_000
    with pytest.raises(MemoryLimitError, match=r"no memory is left for the KV cache.*-utilization 0\.9 of"):
        open_gpu()
