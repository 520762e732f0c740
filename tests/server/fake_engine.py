"""An engine without a model, in the event loop of the server under test, that a test can hold, break and look into."""

from __future__ import annotations

import asyncio
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from tokenspeed.contracts.errors import EngineBusyError, EngineClosedError, EngineDeadError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling, TokenLogprobs
from tokenspeed.engine.async_engine import Health
from tokenspeed.engine.intake import Intake
from tokenspeed.engine.messages import EngineInfo
from tokenspeed.engine.sleep import check_level
from tokenspeed.engine.stream import Outbox, RequestStream
from tokenspeed.engine.trace import Span
from tokenspeed.observability.metrics import STEP_BOUNDS
from tokenspeed.tokenizer.base import VocabularyTokenizer
from tokenspeed.tokenizer.detokenizer import TokenBytes

IDLE = Health(True, "idle")
EOS = 256
VOCAB_SIZE = 257
BEGIN = 1
MARKED = "<"
"""Texts that begin so get BEGIN before them, where special tokens are asked for."""
MAX_MODEL_LEN = 200
MAX_NUM_SEQS = 4
HIDDEN_SIZE = 3
CACHED = 3
"""Prompt tokens that the fake says it had in its cache."""
REFUSED = 7
"""A prompt that begins with this id is refused by the engine itself, after it was submitted."""


WORDS = {"<|im_start|>": 2, "<|im_end|>": 3, "yes": 4, "no": 5}
"""A tokenizer may know them, each as a whole text only."""


@dataclass
class _Bytes:
    words: dict[str, int]

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if text in self.words:
            return [self.words[text]]
        ids = list(text.encode())
        return [BEGIN, *ids] if add_special_tokens and text.startswith(MARKED) else ids


def byte_tokenizer(chat_template: str | None = None, ranks: bool = False) -> VocabularyTokenizer:
    """An id per byte, and one more that ends a text. ranks: it knows WORDS, too."""
    return VocabularyTokenizer(
        encoder=_Bytes(WORDS if ranks else {}),
        token_bytes=TokenBytes(lambda token: bytes([token]) if token < EOS else b"<eos>", VOCAB_SIZE),
        vocab_size=VOCAB_SIZE,
        special_ids=frozenset({EOS}),
        strip_leading_space=False,
        bos_token_id=None,
        eos_token_ids=[EOS],
        chat_template=chat_template,
        special_tokens={},
    )


def shout(request: Request, index: int) -> list[int]:
    """The default answer: the prompt in capitals (samples after the first: repeated index + 1 times), then eos."""
    return list(bytes(token % 256 for token in request.prompt_token_ids).upper()) * (index + 1) + [EOS]


def logprob(token: int, top: int) -> TokenLogprobs:
    """Made up: the token is the likeliest of all, its successors follow."""
    tops = [(token + step) % VOCAB_SIZE for step in range(top)]
    return TokenLogprobs(token, -token / 512, 1, tops, [-(token + step) / 512 for step in range(top)])


def pooled_of(prompt: list[int], pooling: Pooling, num_labels: int) -> bytes:
    """An embedding is of the first id (of the last one where it is a mean), the length, and 1; a logit of a named token
    how often the prompt has it, one of a label the label and the sum of the ids."""
    if pooling.kind == "embedding":
        values = [float(prompt[-1 if pooling.mean else 0]), float(len(prompt)), 1.0]
    elif pooling.token_ids:
        values = [float(prompt.count(token)) for token in pooling.token_ids]
    else:
        values = [label + sum(prompt) / 1000 for label in range(num_labels)]
    return struct.pack(f"<{len(values)}f", *values)


@dataclass
class FakeEngine:
    """Implements `server.engine.Engine`: a token per sample and turn of the loop, as long as `open` is set."""

    tokenizer: VocabularyTokenizer | None = field(default_factory=byte_tokenizer)
    answer: Callable[[Request, int], list[int]] = shout
    defaults: dict[str, object] = field(default_factory=dict)
    num_labels: int = 0
    max_model_len: int = MAX_MODEL_LEN
    backwards: bool = False
    """The last sample comes first."""
    held_after: int | None = None
    """Samples stop after this many tokens until `open` is set."""
    open: asyncio.Event = field(default_factory=asyncio.Event)
    requests: list[Request] = field(default_factory=list)
    aborted: list[str] = field(default_factory=list)
    well: Health = IDLE
    num_waiting: int = 3
    num_running: int | None = None
    """What its statistics say; None for the number of requests that have not ended."""
    death: EngineDeadError | None = None
    closed: bool = False
    killed: str = ""
    paused: bool = False
    asleep: bool = False
    resets: int = 0
    knows_device: bool = True
    refusal: Exception | None = None
    """Of waking."""
    wrong: asyncio.Event = field(default_factory=asyncio.Event)
    """Set: dead or stuck."""

    def __post_init__(self) -> None:
        self.info = EngineInfo(
            model="fake",
            max_model_len=self.max_model_len,
            vocab_size=VOCAB_SIZE,
            sampling_defaults=self.defaults,
            max_num_seqs=MAX_NUM_SEQS,
            hidden_size=HIDDEN_SIZE,
            num_labels=self.num_labels,
        )
        self._intake = Intake(self.info, self.tokenizer, 0)
        self._outboxes: dict[str, Outbox] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams | Pooling,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> RequestStream:
        if self.death or self.closed:
            raise self.death or EngineClosedError("the engine is closed")
        assert request_id is not None
        request = self._intake.request(request_id, prompt, params, priority, cache_salt)
        self.requests.append(request)
        outbox = self._outboxes[request_id] = Outbox(request, request_id, None, self.tokenizer)
        task = asyncio.ensure_future(self._play(request, outbox))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return RequestStream(outbox, lambda: self._abort(request_id))

    @property
    def running(self) -> list[str]:
        """Ids of requests that have not ended."""
        return [name for name, outbox in self._outboxes.items() if not outbox.finished]

    def die(self, error: EngineDeadError) -> None:
        """End, and every request with it."""
        self.death, self.well = error, Health(False, str(error))
        for outbox in self._outboxes.values():
            if not outbox.finished:
                outbox.fail(error)
        self.wrong.set()

    def hang(self, reason: str) -> None:
        """Be stuck; requests go on waiting."""
        self.well = Health(False, reason)
        self.wrong.set()

    async def unwell(self) -> str:
        await self.wrong.wait()
        return self.well.reason

    async def kill(self, reason: str) -> None:
        self.killed = reason
        self.die(EngineDeadError(reason))

    def health(self) -> Health:
        return self.well

    def step_times(self) -> list[float]:
        return [2.0] * (len(STEP_BOUNDS) + 1) + [7.5]

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False

    def is_paused(self) -> bool:
        return self.paused

    async def sleep(self, level: int = 1, timeout: float = 30.0) -> int:
        check_level(level)
        self.asleep = True
        return int(timeout)

    async def wake_up(self) -> None:
        if self.refusal is not None:
            raise self.refusal
        self.asleep = False

    def is_sleeping(self) -> bool:
        return self.asleep

    async def reset_prefix_cache(self) -> None:
        if self.running:
            raise EngineBusyError(f"{len(self.running)} requests are under way")
        self.resets += 1

    async def profile(self, num_steps: int, timeout: float) -> list[Span]:
        return [Span(name, 5.0 + step, 0.25, step) for step in range(num_steps) for name in ("launch", "collect")]

    def stats(self) -> dict[str, float]:
        pages = {"pages_total": 8.0, "pages_held": 2.0}
        prefix = {"prefix_queried_tokens": 50.0, "prefix_hit_tokens": 20.0}
        known = {"floor_share": 0.75, "device_idle_s": 1.25} if self.knows_device else {}
        running = len(self.running) if self.num_running is None else self.num_running
        counts = {"num_running": float(running), "num_waiting": float(self.num_waiting), "num_preemptions": 4.0}
        return counts | pages | prefix | known

    async def drain(self, timeout: float) -> int:
        left = self.running
        for name in left:
            self._abort(name)
        return len(left)

    async def close(self) -> None:
        self.closed = True

    def _abort(self, name: str) -> None:
        outbox = self._outboxes[name]
        if not outbox.finished:
            self.aborted.append(name)
            outbox.abort()

    async def _play(self, request: Request, outbox: Outbox) -> None:
        outbox.output.metrics.queue_s = time.perf_counter() - outbox.output.metrics.arrival_time
        if request.prompt_token_ids[0] == REFUSED:
            outbox.fail(EngineClosedError("refused by the engine"))
            return
        if request.pooling is not None:
            while self.held_after is not None and not self.open.is_set():
                await self.open.wait()
            pooled = pooled_of(request.prompt_token_ids, request.pooling, self.num_labels)
            outbox.take(SequenceUpdate(request_id=request.request_id, pooled=pooled, finish_reason="stop"))
            return
        if request.params.prompt_logprobs is not None:
            top = request.params.prompt_logprobs
            found = [logprob(token, top) for token in request.prompt_token_ids[1:]]
            for half in (found[:2], found[2:]):
                outbox.take(SequenceUpdate(request_id=request.request_id, prompt_logprobs=half))
                await asyncio.sleep(0)
        order = range(request.params.n)[:: -1 if self.backwards else 1]
        await asyncio.gather(*(self._play_sample(request, outbox, index) for index in order))

    async def _play_sample(self, request: Request, outbox: Outbox, index: int) -> None:
        params, done = request.params, 0
        limit = min(params.max_tokens or MAX_MODEL_LEN, self.max_model_len - len(request.prompt_token_ids))
        answer = self.answer(request, index)[:limit]
        while done < len(answer):
            if self.held_after is not None and done >= self.held_after:
                await self.open.wait()
            if outbox.finished or outbox.output.outputs[index].finished():
                return
            new = answer[done : done + 1]
            done += 1
            reason, stopped = None, new[-1] in params.stop_token_ids and new[-1] not in request.eos_token_ids
            if done == len(answer):
                reason = "stop" if stopped or new[-1] in request.eos_token_ids else "length"
            outbox.take(
                SequenceUpdate(
                    request_id=request.request_id,
                    index=index,
                    new_token_ids=new,
                    logprobs=[logprob(token, params.logprobs) for token in new] if params.logprobs is not None else [],
                    finish_reason=reason,
                    stop_reason=new[-1] if stopped and reason else None,
                    num_cached_tokens=CACHED,
                )
            )
            await asyncio.sleep(0)
