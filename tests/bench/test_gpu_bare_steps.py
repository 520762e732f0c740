"""Replayed, marked and stamped steps, on a GPU that is not there."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.kernels.triton import interpreter  # noqa: F401
from tests.kernels.triton.gpu_fakes import SETTINGS, FakeLink, open_fake_gpu
from tests.seeds import SEED
from tests.tiny_llama import write_tiny
from tokenspeed.bench import measured_plan
from tokenspeed.bench.gpu import bare, idle, profile, stamps, timeline
from tokenspeed.bench.gpu.setup import greedy
from tokenspeed.bench.gpu.waterfall import Launch
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.contracts.step import StepDelta, StepPlan
from tokenspeed.engine.llm import LLM
from tokenspeed.engine.trace import Span
from tokenspeed.observability.ceilings import Ceilings

CARD = Ceilings("card", 4600.0, 770.0, 1410.0)
PROMPTS = [[1, 5, 9], [1, *range(3, 20)], [7, 7]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    print(f"seed {SEED}")
    return write_tiny(tmp_path_factory.mktemp("tiny"), SEED)


@pytest.fixture
def gpu(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    return open_fake_gpu(monkeypatch, tiny, FakeLink(), enable_prefix_caching=False)


def tokens(llm: LLM) -> list[list[int]]:
    outputs = llm.generate(prompt_token_ids=PROMPTS, sampling_params=greedy(4), use_tqdm=False)
    return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize("batch, context, steps, draws", [(1, 9, 4, False), (3, 3, 2, True)])
def test_every_replay_feeds_a_token_more_of_each_sequence(
    gpu: LLM, batch: int, context: int, steps: int, draws: bool
) -> None:
    executor: Any = gpu.core.executor
    state = executor.state.lengths
    seen: list[list[int]] = []

    def timer(run: Callable[[], None], times: int) -> float:
        for number in range(times):
            run()
            fed = context + bare.OWN_STEPS + number + 1
            assert state.num_computed[:batch].tolist() == [fed] * batch
            assert state.num_tokens[:batch].tolist() == [fed + 1] * batch
        seen.append(state.pool[0, context + 1 : context + times].tolist())
        return float(len(seen))

    assert bare.bare_ms(gpu, batch, context, steps, draws=draws, repeats=2, timer=timer) == [1.0, 2.0]
    assert seen[0] == seen[1], "each repeat starts where the first did"
    one_more: list[int] = []

    def beyond(run: Callable[[], None], times: int) -> float:
        for _ in range(times + 1):
            run()
        one_more.extend(state.num_computed[:batch].tolist())
        return 0.0

    bare.bare_ms(gpu, batch, context, steps, repeats=1, timer=beyond)
    assert one_more == [context + bare.OWN_STEPS + steps] * batch, "no page, no token"


def test_the_engine_is_as_before(gpu: LLM, tiny: Path) -> None:
    wanted = tokens(LLM(str(tiny), **SETTINGS))
    for _ in range(2):
        bare.bare_ms(gpu, 4, 11, 3, repeats=1, timer=lambda run, times: 0.0)
        assert tokens(gpu) == wanted
    gpu.core.cache.check_idle()


def test_a_step_that_cannot_be_repeated_is_refused(gpu: LLM) -> None:
    executor = bare.executor_of(gpu)
    sequences = bare.sequences_of(gpu, 2, 5, 4)
    with pytest.raises(RuntimeError, match="would bring them again"):
        executor.repeatable(sequences.enter(0))
    executor.launch(sequences.enter(0)).result()
    executor.graphs.forget()
    with pytest.raises(RuntimeError, match=r"bucket=2, rows=2, mixed=False.*no graph"):
        executor.repeatable(sequences.go_on(1))()
    executor.launch(StepPlan(2, StepDelta(freed=[0, 1]), [])).result()


def test_a_cpu_has_no_graphs(tiny: Path) -> None:
    with pytest.raises(UnsupportedError, match="captured"):
        bare.bare_ms(LLM(str(tiny), **SETTINGS), 1, 5, 2)


@pytest.fixture
def profiler(gpu: LLM, monkeypatch: pytest.MonkeyPatch) -> profile.Profiler:
    """What is launched, as a profile of kernels of 1 us, each 1 us after the one before: records by their ops."""
    log: list[str] = []
    monkeypatch.setattr(stamps.Ring, "stamp", lambda self, which: log.append(profile.MARK))
    executor: Any = gpu.core.executor
    walk, prepare, finish = executor.backend.walk, executor._kernels.prepare, executor._kernels.finish

    def logged(steps: Any, view: Any, values: Any) -> None:
        log.extend(f"{step.record.op}_kernel" for step in steps if step.record.op != "split")
        walk(steps, view, values)

    def around(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def logged_run(*given: Any) -> Any:
            log.append(name)
            return run(*given)

        return logged_run

    executor.backend.walk = logged
    executor._kernels.prepare, executor._kernels.finish = around("_scatter", prepare), around("_finish", finish)

    def profiler(run: Callable[[], object]) -> list[Launch]:
        log[:] = ["Memcpy HtoD"]
        run()
        return [Launch(name, 2.0 * at, 2.0 * at + 1.0) for at, name in enumerate(log)]

    return profiler


def test_kernels_are_told_by_the_op_between_the_marks(gpu: LLM, profiler: profile.Profiler) -> None:
    walk = bare.executor_of(gpu).backend.walk
    labels = profile.launch_order(gpu, 2, 9, profiler=profiler)
    assert bare.executor_of(gpu).backend.walk is walk
    assert labels[0] == ("prepare", "_scatter")
    assert labels[-1] == ("sample", "_finish")
    assert all(label.kernel.startswith(label.op.split()[0]) for label in labels[1:-1])
    roles = [label.op for label in labels]
    assert roles.count("linear o") == roles.count("linear down") == 2
    assert "split" not in " ".join(roles)
    assert tokens(gpu)


def test_every_record_of_a_step_is_measured(
    gpu: LLM, profiler: profile.Profiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profile, "profiled", profiler)
    rows, step_us = measured_plan.gpu_rows(gpu, 2, 9, CARD, steps=30)
    records = [row for row in rows if row.floor]
    assert (rows[0].op, rows[-1].op) == ("prepare", "sample")
    plain = [part for record in gpu.core.model.program.records for part in record.plain()]
    assert sorted(row.op for row in records) == sorted(part.op for part in plain)
    assert [row.us for row in records] == [float(row.op != "split") for row in records]
    assert sum(row.us + row.gap_us for row in rows) == pytest.approx(step_us)
    assert step_us == 2 * sum(row.op != "split" for row in rows)
    plan = measured_plan.MeasuredPlan("tiny", "card", 2, 9, rows, step_us)
    assert sum(row.get("bytes", 0) for row in plan.as_json()["rows"]) == pytest.approx(plan.as_json()["bytes"], abs=60)
    assert f"{step_us:.1f} us in all" in plan.text()


def test_a_step_without_its_marks_is_refused(
    gpu: LLM, profiler: profile.Profiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    def one_more(run: Callable[[], object]) -> Sequence[Launch]:
        taken.append(1)
        found = profiler(run)
        return (
            [each for launch in found for each in [launch] * (1 + (launch.name == "_scatter"))] if taken[1:] else found
        )

    monkeypatch.setattr(profile, "profiled", one_more)
    with pytest.raises(UnsupportedError, match="not those of the step"):
        measured_plan.gpu_rows(gpu, 1, 9, CARD, steps=30)


class FakeStamps:
    """In place of the kernel: a clock that goes on by one more each time."""

    def __init__(self) -> None:
        self.clock, self.by = 1000, itertools.count(1)

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def run(times: Any, count: Any, RING: int, LAST: int, num_warps: int) -> None:
            self.clock += 32 * next(self.by)
            times[LAST, int(count) % RING] = self.clock
            count += LAST

        return run


def test_the_gap_is_from_a_steps_last_stamp_to_the_nexts_first(gpu: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens(gpu)
    monkeypatch.setattr(stamps, "stamp_kernel", FakeStamps())
    monkeypatch.setattr(idle, "PROMPT", 5)
    kernels = bare.executor_of(gpu)._kernels
    gaps, clock = idle.measure(gpu, steps=6)
    assert clock == 32
    assert len(gaps) == 6
    # The clock goes on by one more unit at every stamp, and between two gaps there are two.
    assert {round((b - a) * 1e3) for a, b in itertools.pairwise(gaps)} == {64}
    assert bare.executor_of(gpu)._kernels is kernels
    assert tokens(gpu) == before


def test_every_step_of_a_run_is_told_with_its_phases(gpu: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    before = tokens(gpu)
    monkeypatch.setattr(stamps, "stamp_kernel", FakeStamps())
    steps = timeline.timeline(gpu, 3, 5, 4)
    assert [step.tokens for step in steps] == [15, 3, 3, 3]  # 16 tokens a step: no prompt is cut
    # The clock goes on by one unit of 32 ns more at every stamp.
    ticks = [round(each * 1e3) for step in steps for each in (step.gap, step.device)][1:]
    assert {b - a for a, b in itertools.pairwise(ticks)} == {32}
    assert all(min(step.host) > 0 for step in steps)
    assert gpu.core.trace is None
    assert tokens(gpu) == before


def test_steps_and_phases_are_put_together() -> None:
    """Two steps; the host's clock is 5 s ahead of the device's, and the second result is noticed at once."""
    starts, ends = [1_000_000, 3_007_000], [3_000_000, 5_000_000]
    spans = [
        Span("schedule", 5.0001, 0.00002, 7, 40),
        Span("launch", 5.0005, 0.0001, 7, 40),
        Span("launch", 5.0028, 0.0002, 9, 3),
        Span("collect", 5.0006, 0.00245, 7, 40),
        Span("update", 5.00305, 0.00001, 7, 40),
        Span("collect", 5.0031, 0.0019, 9, 3),
    ]
    first, second = timeline.joined(starts, ends, spans)
    assert (first.tokens, first.device, first.gap) == (40, 2000.0, 0.0)
    assert first.host == pytest.approx((20.0, 100.0, 2450.0, 10.0))
    assert [first.ahead, second.ahead] == pytest.approx([400.0, 7.0])
    assert (second.tokens, second.device, second.gap) == (3, 1993.0, 7.0)
    assert second.host == pytest.approx((0.0, 200.0, 1900.0, 0.0))
    told = timeline.text([first, second])
    assert "1 steps of 40 tokens: median 2000.0 us, 0.0 us before each" in told
    assert "in all 3.99 ms in steps, 0.007 ms between; gaps over 50 us: []" in told
    with pytest.raises(RuntimeError, match="1 steps have stamps, 2 were launched"):
        timeline.joined(starts[:1], ends[:1], spans)


def test_gaps_that_are_too_few_are_refused() -> None:
    assert stamps.gaps_us([0, 5000, 9000], [4000, 8000, 12000], 2) == [1.0, 1.0]
    with pytest.raises(RuntimeError, match="2 gaps"):
        stamps.gaps_us([0, 5000, 9000], [4000, 8000, 12000], 3)
