"""Errors a user can cause or meet. Each message names the thing and the limit; the CLI prints it without a
traceback."""

from typing import Any


class TokenSpeedError(Exception):
    """Base of every error that is reported to a user as one line."""


class ConfigError(TokenSpeedError, ValueError):
    """A flag, a field of a config file or a combination of them is not usable."""


class ParameterError(TokenSpeedError, ValueError):
    """A request parameter is unknown, out of range or contradicts another."""


class PromptError(TokenSpeedError, ValueError):
    """A prompt is empty, too long, or holds an id outside the vocabulary."""


class LogitsProcessorError(TokenSpeedError):
    """A request's logits processor raised, or gave what is no logits; the message names it and says what.

    `outputs`: of `LLM.generate`, those of every prompt; the samples that it ended have the finish_reason "error".
    """

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.outputs: list[Any] = []


class FormatError(TokenSpeedError):
    """A model file is truncated, corrupt or inconsistent."""


class WeightError(TokenSpeedError):
    """A checkpoint lacks a tensor, holds a surplus one, or one has the wrong shape."""


class UnsupportedError(TokenSpeedError):
    """An architecture, tensor type or feature this version does not run; the message lists what it does run."""


class ModelNotFoundError(TokenSpeedError):
    """No model at that path or name, or it cannot be fetched."""


class MemoryLimitError(TokenSpeedError):
    """Not enough memory; the message says what is needed, what is free and which flag helps."""


class DeviceError(TokenSpeedError):
    """A call to a device's driver failed; the message names the call, what it was asked for and what is there."""


class EngineDeadError(TokenSpeedError):
    """The engine process ended or failed while it was needed; the message says how. Nothing more comes from it."""


class EngineClosedError(TokenSpeedError):
    """The engine takes no new requests: it is draining or closed."""


class EngineAsleepError(EngineClosedError):
    """The engine sleeps and takes no new requests until it is woken."""


class EngineBusyError(TokenSpeedError):
    """What was asked for must wait until no request is under way; the message says how many are."""
