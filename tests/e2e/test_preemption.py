"""The demo model under memory pressure: preempted sequences come back and say what they would have said."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.ops.definitions import kv_entry_bytes
from tokenspeed.scheduler.config import SchedulerConfig
from tokenspeed.scheduler.scheduler import Scheduler
from tokenspeed.scheduler.sequence import Sequence

DATA = Path(__file__).parents[1] / "data" / "gemma3-270m-greedy.json"
ITEMS = json.loads(DATA.read_text(encoding="utf-8"))["items"]
LENGTH = 48
PAGE = 4


class EveryoneIn:
    """Admits whoever comes, so that pages run out."""

    version = 0

    def admits(self, newcomer: Sequence, num_shared: int, running: Collection[Sequence], step_id: int) -> bool:
        return True

    def refresh(self, running: Collection[Sequence], step_id: int) -> None:
        pass

    def ended(self, num_output: int, cut: bool) -> None:
        pass

    def changed(self) -> None:
        self.version += 1


def crowded(path: Path, kv: str = "float32") -> LLM:
    """Pages for about two of the five reference runs, and no admission control.

    kv: with float32 the C++ walk gives the reference's tokens.
    """
    bytes_per_page = 3 * 2 * PAGE * kv_entry_bytes(kv, 256)
    pages = 6 * 2 * (LENGTH + 16) // PAGE
    llm = LLM(
        str(path),
        kv_cache_dtype=kv,
        block_size=PAGE,
        max_model_len=128,
        kv_cache_memory_bytes=pages * bytes_per_page,
    )
    assert llm.core.backend.name == "cpu"
    assert llm.core.capacity.num_pages == pages
    limits = SchedulerConfig(8, 64, llm.core.capacity.max_model_len)
    llm.core.scheduler = Scheduler(limits, llm.core.cache, EveryoneIn())
    return llm


def test_preempted_runs_give_the_reference_tokens(demo_path: Path) -> None:
    llm = crowded(demo_path)
    greedy = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    outputs = llm.generate(
        prompt_token_ids=[item["prompt_ids"] for item in ITEMS], sampling_params=greedy, use_tqdm=False
    )
    assert llm.core.scheduler.stats().num_preemptions >= 2
    for item, output in zip(ITEMS, outputs, strict=True):
        assert output.outputs[0].token_ids == item["greedy_ids"]
    llm.core.cache.check_idle()


def test_aborts_around_preempted_runs_change_nothing(demo_path: Path) -> None:
    llm = crowded(demo_path)
    greedy = SamplingParams(temperature=0, max_tokens=LENGTH, ignore_eos=True)
    streams = [llm.stream({"prompt_token_ids": item["prompt_ids"]}, greedy) for item in ITEMS]
    for _ in range(10):
        next(streams[0])
    streams[1].close()  # type: ignore[attr-defined]
    for _ in range(10):
        next(streams[2])
    streams[4].close()  # type: ignore[attr-defined]
    finished = {index: list(streams[index])[-1][1] for index in (0, 2, 3)}
    assert llm.core.scheduler.stats().num_preemptions >= 1
    for index, output in finished.items():
        assert output.outputs[0].token_ids == ITEMS[index]["greedy_ids"]
    assert not llm.core.has_work
    llm.core.cache.check_idle()
