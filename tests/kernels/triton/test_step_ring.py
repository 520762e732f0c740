"""Headers and tokens through memory that host and device share, on a device that does everything as late as it can."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.triton.gpu_fakes import SETTINGS, LateLink, LateSteps, open_fake_gpu
from tests.seeds import SEED
from tests.tiny_llama import write_tiny
from tokenspeed.contracts.errors import DeviceError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.kernels.triton.mailbox import HEAD, ROW_FIELDS
from tokenspeed.runner.gpu import ring
from tokenspeed.runner.gpu.ring import NOTHING, SLOTS, StepRing

ROWS, PAIRS = 5, 6


@pytest.fixture(autouse=True)
def _look_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SPIN_S", 0.0)
    monkeypatch.setattr(ring, "NAP_S", 0.0)


@dataclass
class Device:
    """Reads the header of its next step when it is asked whether it is idle, then answers each row with its slot plus
    100 times its offset; a fault comes in place of a step."""

    left: int = 0
    shared: list[torch.Tensor] = field(default_factory=list)
    read: list[list[int]] = field(default_factory=list)
    fault: str = ""
    turn: int = 0

    def pinned(self, *shape: int) -> torch.Tensor:
        self.shared.append(torch.zeros(shape, dtype=torch.int32))
        return self.shared[-1]

    def mark(self) -> Callable[[], None]:
        def drain() -> None:
            while not self.idle():
                pass

        return drain

    def idle(self) -> bool:
        if self.fault:
            raise RuntimeError(self.fault)
        if self.left:
            self.left -= 1
            self.turn += 1
            header, results = (each[self.turn % SLOTS] for each in self.shared)
            words = header[HEAD : HEAD + ROW_FIELDS * int(header[0])].view(-1, ROW_FIELDS)
            self.read.append(words.flatten().tolist())
            tokens = torch.full((ROWS,), -1, dtype=torch.int32)
            tokens[: len(words)] = words[:, 0] + 100 * words[:, 2]
            results.view(-1, 2)[:, 0] = tokens
            results.view(-1, 2)[:, 1] = (self.turn + 2**31) % 2**32 - 2**31
        return not self.left


def opened(first: int = 1) -> tuple[StepRing, Device]:
    """A ring whose next step has that number, with words of none."""
    device = Device()
    found = StepRing(device, ROWS, PAIRS, torch.device("cpu"))
    device.shared[1].fill_(77)
    found._number = found._answered = device.turn = first - 1
    return found, device


def random_rows(rng: random.Random) -> list[tuple[int, int, int, int]]:
    return [(rng.randrange(99), 1, rng.randrange(99), rng.randrange(999)) for _ in range(rng.randrange(1, ROWS + 1))]


@pytest.mark.parametrize("first", [1, 2**31 - 3, 2**32 - 3], ids=["first", "sign", "wrap"])
@pytest.mark.parametrize("seed", [SEED, SEED + 1])
def test_every_step_reads_its_own_header_and_is_answered(seed: int, first: int) -> None:
    rng = random.Random(seed)
    posts, device = opened(first)
    under_way: deque[tuple[int, list[tuple[int, int, int, int]]]] = deque()
    for _ in range(3 * SLOTS):
        rows = random_rows(rng)
        under_way.append((posts.post(rows, NOTHING, NOTHING), rows))
        device.left += 1
        if len(under_way) == rng.choice((2, SLOTS)) or len(under_way) == SLOTS:
            number, posted = under_way.popleft()
            assert posts.wait(number, len(posted)) == [row[0] + 100 * row[2] for row in posted]
            assert device.read[number - first] == [word for row in posted for word in row]
    assert device.turn - first + 1 >= 2 * SLOTS


def test_a_slot_is_written_again_only_when_its_step_has_answered() -> None:
    """Nobody waits for the steps here, as after an interruption."""
    rng = random.Random(SEED)
    posts, device = opened()
    posted = []
    for _ in range(2 * SLOTS + 1):
        posted.append(random_rows(rng))
        number = posts.post(posted[-1], NOTHING, NOTHING)
        device.left += 1
    assert posts.wait(number, 1) == [posted[-1][0][0] + 100 * posted[-1][0][2]]
    assert device.read == [[word for row in rows for word in row] for rows in posted]


def test_words_of_another_step_are_no_answer() -> None:
    posts, device = opened()
    number = posts.post([(1, 1, 0, 9)] * 2, NOTHING, NOTHING)
    words = device.shared[1].view(SLOTS, ROWS, 2)[number % SLOTS]
    for stale in (number - SLOTS, number + SLOTS):
        words[:] = torch.tensor([7, stale])
        with pytest.raises(DeviceError, match="no work left and step 1 has no result"):
            posts.wait(number, 2)
    for fresh in (0, 1):
        words[fresh], words[1 - fresh] = torch.tensor([7, number]), torch.tensor([7, number - SLOTS])
        with pytest.raises(DeviceError, match="step 1 has no result"):
            posts.wait(number, 2)
    words[0] = torch.tensor([-1, number])
    assert posts.wait(number, 2) == [-1, 7]
    assert posts.wait(number, 0) == []


def test_a_step_without_rows_is_waited_for() -> None:
    posts, device = opened()
    number = posts.post([], NOTHING, NOTHING)
    device.left += 1
    assert posts.wait(number, 0) == []
    assert device.turn == number


def test_what_the_device_raised_is_raised() -> None:
    posts, device = opened()
    number = posts.post([(1, 1, 0, 9)], NOTHING, NOTHING)
    device.left, device.fault = 1, "an illegal memory access was encountered"
    with pytest.raises(RuntimeError, match="illegal memory access"):
        posts.wait(number, 1)


def test_after_a_broken_launch_host_and_device_count_alike() -> None:
    posts, _ = opened()
    posts.post([(1, 1, 0, 9)], NOTHING, NOTHING)  # never launched
    posts.lose()
    assert posts.post([(2, 1, 0, 9)], NOTHING, NOTHING) == 2
    assert posts.mailbox.turn.tolist() == [1]


def test_pairs_beyond_a_header_are_refused() -> None:
    posts, _ = opened()
    many = np.arange(PAIRS + 2 * ROWS + 1, dtype=np.int32)
    with pytest.raises(ValueError, match="need a header"):
        posts.post([], many, many)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    print(f"seed {SEED}")
    return write_tiny(tmp_path_factory.mktemp("tiny"), SEED)


Late = tuple[LLM, LateLink]


@pytest.fixture
def late(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Late:
    link = LateLink()
    gpu = open_fake_gpu(monkeypatch, tiny, link)
    executor: Any = gpu.core.executor
    executor.wrap_kernels(lambda kernels: LateSteps(kernels, link))
    return gpu, link


PROMPTS = [[1, 5, 9], [1, 7], [1, *range(20, 31)]]
KINDS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "seed": 4},
    {"temperature": 1.0, "repetition_penalty": 1.3, "seed": 6},
]


def params_of(rng: random.Random) -> list[SamplingParams]:
    return [SamplingParams(max_tokens=rng.randrange(4, 13), ignore_eos=True, **kind) for kind in KINDS]


def tokens(llm: LLM, params: list[SamplingParams]) -> list[list[int]]:
    outputs = llm.generate(prompt_token_ids=PROMPTS, sampling_params=params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def test_a_late_device_gives_the_same_tokens(tiny: Path, late: Late) -> None:
    gpu, link = late
    reference = LLM(str(tiny), **SETTINGS)
    rng = random.Random(SEED)
    for _ in range(3):
        params = params_of(rng)
        assert tokens(gpu, params) == tokens(reference, params)
    assert link.most == 2
    gpu.core.cache.check_idle()


@pytest.mark.parametrize("broken", ["prepare", "sample", "finish"])
def test_a_launch_that_is_broken_off_leaves_a_working_engine(
    tiny: Path, late: Late, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    """Eager steps, so that the launch itself is in the kernels when it ends: before the device counts, or after."""
    gpu, link = late
    executor: Any = gpu.core.executor
    executor.graphs.forget()
    params = [SamplingParams(max_tokens=5, ignore_eos=True, **kind) for kind in KINDS]

    def interrupted(*args: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(executor._kernels, broken, interrupted)
        with pytest.raises(KeyboardInterrupt):
            tokens(gpu, params)
    link.drain()
    assert tokens(gpu, params) == tokens(LLM(str(tiny), **SETTINGS), params)


def test_steps_that_nobody_waited_for_are_overtaken_safely(tiny: Path, late: Late) -> None:
    """Requests are aborted with steps under way, and others take their slots."""
    gpu, link = late
    greedy = [SamplingParams(max_tokens=8, ignore_eos=True, temperature=0)] * len(PROMPTS)
    wanted = tokens(LLM(str(tiny), **SETTINGS), greedy)
    assert tokens(gpu, greedy) == wanted  # captured from here on
    for count in range(1, 4):
        stream: Any = gpu.stream({"prompt_token_ids": PROMPTS[2]}, greedy[0])
        for _ in range(count):
            next(stream)
        stream.close()
        assert link.queue
        assert tokens(gpu, greedy) == wanted
    assert not gpu.core.has_work


class Calls(TorchDispatchMode):
    """Notes every torch operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.blocking: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        if func is torch.ops.aten.copy_.default and not (len(args) > 2 and args[2]):
            self.blocking.append(str(args[0].shape))
        return func(*args, **(kwargs or {}))


def test_a_decoding_step_gives_the_device_its_graph_and_nothing_else(late: Late) -> None:
    gpu, link = late
    executor: Any = gpu.core.executor
    launch, steps = executor.launch, []

    def noted(plan: Any) -> Any:
        with Calls() as calls:
            queued = len(link.queue)
            found = launch(plan)
            if len(link.queue) == queued + 1 and not plan.delta.new:
                steps.append((bool(plan.delta.grants), calls.names))
        return found

    executor.launch = noted
    params = [SamplingParams(max_tokens=12, ignore_eos=True, temperature=0)] * len(PROMPTS)
    tokens(gpu, params)
    assert len(steps) > 8
    assert {grants for grants, _ in steps} == {True, False}
    assert all(names == [] for _, names in steps), steps


@pytest.mark.parametrize("pairs", [1024, 40], ids=["in the header", "beyond it"])
def test_sequences_enter_without_waiting(tiny: Path, monkeypatch: pytest.MonkeyPatch, pairs: int) -> None:
    """A copy that blocks waits for all steps before it. What a header cannot hold is copied ahead of it."""
    monkeypatch.setattr("tokenspeed.runner.gpu.executor.PAIRS", pairs)
    link = LateLink()
    gpu = open_fake_gpu(monkeypatch, tiny, link)
    executor: Any = gpu.core.executor
    executor.wrap_kernels(lambda kernels: LateSteps(kernels, link))
    upload, entered, blocking = executor._upload, [], []
    ahead: list[str] = []

    def noted(changes: Any, rows: Any) -> int:
        with Calls() as calls:
            number: int = upload(changes, rows)
        entered.append(len(changes.new))
        blocking.extend(calls.blocking)
        ahead.extend(name for name in calls.names if "index_copy" in name)
        return number

    executor._upload = noted
    params = [SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.8, seed=seed) for seed in (3, 4, 5)]
    assert tokens(gpu, params) == tokens(LLM(str(tiny), **SETTINGS), params)
    assert max(entered) > 1
    assert blocking == []
    assert bool(ahead) == (pairs == 40)
