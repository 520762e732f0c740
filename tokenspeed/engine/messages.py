"""What the serving process and the engine process say to each other: msgpack, one typed struct per message."""

from __future__ import annotations

from typing import Any, Protocol

import msgspec

from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.source import ModelFormat
from tokenspeed.contracts import errors
from tokenspeed.contracts.errors import EngineDeadError, TokenSpeedError
from tokenspeed.contracts.request import Request, SequenceUpdate
from tokenspeed.engine.trace import Span


class ModelHead(Protocol):
    """What a model is asked at its end."""

    @property
    def model(self) -> str:
        """Its name, as the user gave it."""
        ...

    @property
    def num_labels(self) -> int:
        """Of a classification head; 0 for a language model."""
        ...


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the serving process has to know of a loaded model."""

    model: str
    """Its name, as the user gave it."""
    path: str | None = None
    """Where its tokenizer is; None for a shipped config with random weights."""
    format: ModelFormat | None = None
    max_model_len: int
    vocab_size: int
    """Rows of the model's head: ids below this are valid."""
    eos_token_ids: list[int] = []
    sampling_defaults: dict[str, Any] = {}
    """Fields of SamplingParams that the checkpoint states."""
    max_num_seqs: int = 0
    num_pages: int = 0
    block_size: int = 0
    """The KV cache holds `num_pages * block_size` tokens."""
    fallback_ops: list[str] = []
    """Ops for which the fast backend had no kernel, so that the reference runs the model."""
    hidden_size: int = 0
    """Of an embedding."""
    num_labels: int = 0
    """Of a classification head, which a model has in place of a language head; 0 for a language model."""
    headless: bool = False
    """It has neither, and gives embeddings alone."""
    decode_floor: list[tuple[int, float]] = []
    """(tokens of context, ms that a decode step of one sequence takes at the measured read bandwidth), in order of
    context; empty where the bandwidth was never measured."""


class ErrorInfo(msgspec.Struct, array_like=True, frozen=True):
    """An exception: its class name and text."""

    kind: str
    message: str

    @classmethod
    def of(cls, error: BaseException) -> ErrorInfo:
        """Describe an exception."""
        return cls(type(error).__name__, str(error))

    def rebuild(self) -> TokenSpeedError:
        """The same class with the same text; what is no user's error becomes an EngineDeadError that names it."""
        kind = _USER_ERRORS.get(self.kind)
        if kind is not None:
            return kind(self.message)
        return self.fatal()

    def fatal(self) -> EngineDeadError:
        """The error of everything that still waited for the engine."""
        return EngineDeadError(f"the engine failed: {self.kind}: {self.message}; its log has the traceback")


_USER_ERRORS = {
    name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, TokenSpeedError)
}


class Start(msgspec.Struct, kw_only=True):
    """The line of JSON that a new engine process reads from stdin: the descriptor of its end of the socket, and what to
    load.

    The serving process holds the other end of stdin open; its end of file means that nobody is left to serve.
    """

    fd: int
    config: EngineConfig


class Submit(msgspec.Struct, tag="submit", array_like=True):
    """A new request."""

    request: Request


class Abort(msgspec.Struct, tag="abort", array_like=True):
    """End a request, or one of its sequences. Unknown ids are nothing: the request may have ended meanwhile."""

    request_id: str
    index: int | None = None


class Sleep(msgspec.Struct, tag="sleep", array_like=True):
    """Give back the memory of the KV cache. No request is under way."""

    level: int = 1


class Wake(msgspec.Struct, tag="wake", array_like=True):
    """Take it again."""


class Forget(msgspec.Struct, tag="forget", array_like=True):
    """Drop the prefixes that the cache holds. No request is under way."""


class Profile(msgspec.Struct, tag="profile", array_like=True):
    """Note the phases of the next `steps` steps; 0: of no more. Each Profile that is not 0 has one Profiled."""

    steps: int


class Stop(msgspec.Struct, tag="stop", array_like=True):
    """Release the model and end the process."""


class Loading(msgspec.Struct, tag="loading", array_like=True):
    """Progress of the start, in bytes of the checkpoint."""

    done: int
    total: int


class Ready(msgspec.Struct, tag="ready", array_like=True):
    """The model is loaded."""

    info: EngineInfo


class Step(msgspec.Struct, tag="step", array_like=True, gc=False):
    """What one step brought for all sequences, and at times the counters of the engine.

    num_steps: finished since the start; it stands still where the engine turns round without getting anywhere.
    idle_after: with nothing left to do, how many messages were taken in until then. An engine with work sends one of
    these at least every `loop.REPORT_S` seconds, unless it is caught in a step.
    started: requests that were fed for the first time since the message before, and how many seconds they had waited.
    step_times: `observability.metrics.Histogram.state` over STEP_BOUNDS, since the start; comes with `stats`.
    """

    updates: list[SequenceUpdate]
    num_steps: int
    idle_after: int | None = None
    stats: dict[str, float] | None = None
    started: list[tuple[str, float]] = []
    step_times: list[float] = []


class Refused(msgspec.Struct, tag="refused", array_like=True):
    """A request was not taken; the others go on."""

    request_id: str
    error: ErrorInfo


class Changed(msgspec.Struct, tag="changed", array_like=True):
    """The answer to a Sleep, a Wake or a Forget: what the engine does now, and why not what was asked for."""

    asleep: bool
    error: ErrorInfo | None = None


class Profiled(msgspec.Struct, tag="profiled", array_like=True):
    """The phases of the steps that were to be noted."""

    spans: list[Span]


class Failed(msgspec.Struct, tag="failed", array_like=True):
    """The start or a step failed; the process ends after this."""

    error: ErrorInfo


ToEngine = Submit | Abort | Sleep | Wake | Forget | Profile | Stop
FromEngine = Loading | Ready | Step | Refused | Changed | Profiled | Failed
