"""What the server knows of an engine: the async one, a fake of a test, later a router over several."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.output import RequestOutput
from tokenspeed.engine.stream import PlainSink
from tokenspeed.engine.trace import Span
from tokenspeed.tokenizer.base import Tokenizer


class Info(Protocol):
    """What a loaded model is."""

    @property
    def model(self) -> str:
        """Its name, as the user gave it."""
        ...

    @property
    def max_model_len(self) -> int:
        """Most tokens of one sequence, prompt and output."""
        ...

    @property
    def sampling_defaults(self) -> Mapping[str, Any]:
        """Fields of SamplingParams that the checkpoint states."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Most sequences computed at once."""
        ...

    @property
    def fallback_ops(self) -> Sequence[str]:
        """Ops that run slowly for want of a fast kernel."""
        ...

    @property
    def hidden_size(self) -> int:
        """Of an embedding."""
        ...

    @property
    def num_labels(self) -> int:
        """Of a classification head; 0 for a language model."""
        ...

    @property
    def decode_floor(self) -> Sequence[tuple[int, float]]:
        """(tokens of context, least ms of a decode step of one sequence), in order; empty where unknown."""
        ...


class Health(Protocol):
    """Whether the engine makes progress or has nothing to do."""

    @property
    def ok(self) -> bool: ...

    @property
    def reason(self) -> str: ...


class Stream(Protocol):
    """One request: its outputs in delta form, until it has finished or an error of `contracts.errors` ends it."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    def push_to(self, sink: PlainSink) -> None:
        """From now on hand plain text to `sink` while the reader waits, and the reader everything else."""
        ...

    def abort(self) -> None:
        """End the request now; nothing happens when it has ended already."""
        ...


class Engine(Protocol):
    """A model that takes requests."""

    @property
    def info(self) -> Info: ...

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a model without one, which takes and gives ids alone."""
        ...

    def submit(
        self,
        prompt: str | list[int],
        params: SamplingParams | Pooling,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> Stream:
        """Queue a request. Raises an error of `contracts.errors` for one that cannot be taken."""
        ...

    def health(self) -> Health: ...

    def stats(self) -> Mapping[str, float]:
        """Counters and gauges by name."""
        ...

    def step_times(self) -> Sequence[float]:
        """`Histogram.state` of its steps over STEP_BOUNDS; empty where there are none."""
        ...

    def pause(self) -> None:
        """Let new requests wait until `resume`; those before go on."""
        ...

    def resume(self) -> None: ...

    def is_paused(self) -> bool: ...

    async def sleep(self, level: int = 1, timeout: float = 30.0) -> int:
        """Give back the memory of the KV cache and refuse requests; how many had to be aborted after `timeout`
        seconds."""
        ...

    async def wake_up(self) -> None: ...

    def is_sleeping(self) -> bool: ...

    async def reset_prefix_cache(self) -> None:
        """Raises EngineBusyError while it has a request."""
        ...

    async def profile(self, num_steps: int, timeout: float) -> list[Span]:
        """Phases of the next steps, or of as many as there are within `timeout` seconds."""
        ...

    async def drain(self, timeout: float) -> int:
        """Take no new requests, finish those that run within `timeout` seconds, abort the rest; how many those were."""
        ...

    async def unwell(self) -> str:
        """Wait until it is dead or stuck; what is wrong."""
        ...

    async def kill(self, reason: str) -> None:
        """End it at once, and every stream with an EngineDeadError that says `reason`."""
        ...

    async def close(self) -> None: ...


Progress = Callable[[int, int], None]
StartEngine = Callable[[Progress], Awaitable[Engine]]
"""Loads a model and reports (done, total) on the way."""
