"""Callables of a request that change its logits, and what becomes of a request whose callable fails."""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from tokenspeed.contracts.errors import LogitsProcessorError
from tokenspeed.contracts.executor import Executor
from tokenspeed.contracts.sampling import takes_prompt
from tokenspeed.runner.edits import SampledRow


class LogitsProcessors:
    """Those of all requests of one executor, by the number that `SamplingRow.processors` has. False while empty.

    A request whose processor failed draws from the raw logits, and its processors are not called again: what it gets
    until it is ended is thrown away.
    """

    def __init__(self) -> None:
        self._requests: dict[int, _Processed] = {}
        self._by_id: dict[str, int] = {}
        self._numbers = itertools.count(1)
        self._failures: list[tuple[str, LogitsProcessorError]] = []

    def __bool__(self) -> bool:
        return bool(self._requests)

    def add(self, request_id: str, processors: Sequence[Any]) -> int:
        """Keep a request's processors; their number."""
        number = self._by_id[request_id] = next(self._numbers)
        self._requests[number] = _Processed(request_id, [_Processor.of(each) for each in processors])
        return number

    def drop(self, request_id: str) -> None:
        """Forget those of a request, if it has any: no step will name it again."""
        number = self._by_id.pop(request_id, None)
        if number is not None:
            del self._requests[number]

    def take_failures(self) -> list[tuple[str, LogitsProcessorError]]:
        """(request id, error) of what failed since the last call, once for each request."""
        failures, self._failures = self._failures, []
        return failures

    def apply(self, logits: torch.Tensor, rows: Sequence[SampledRow]) -> torch.Tensor:
        """Float32 logits [rows, vocabulary] as the rows' processors make them: a copy, or `logits` where there are
        none."""
        concerned = [at for at, row in enumerate(rows) if row.sampling.processors]
        if not concerned:
            return logits
        processed = logits.clone()
        for at in concerned:
            request = self._requests[rows[at].sampling.processors]
            if request.failed:
                continue
            try:
                processed[at] = request.run(processed[at], rows[at])
            except LogitsProcessorError as error:
                request.failed = True
                processed[at] = logits[at]
                self._failures.append((request.request_id, error))
        return processed


class ProcessingExecutor(Executor, Protocol):
    """An executor in this process, which can call a request's processors."""

    @property
    def processors(self) -> LogitsProcessors: ...


@dataclass(frozen=True)
class _Processor:
    """A callable, what to call it in an error, and whether it wants the prompt's ids."""

    function: Callable[..., Any]
    name: str
    with_prompt: bool

    @staticmethod
    def of(function: Callable[..., Any]) -> _Processor:
        """Named as a function is, else as its class."""
        named = function if inspect.isroutine(function) or inspect.isclass(function) else type(function)
        return _Processor(function, str(named.__qualname__), takes_prompt(function))

    def __call__(self, logits: torch.Tensor, row: SampledRow) -> Any:
        """The lists of ids are the callable's own."""
        output = list(row.tokens[row.num_prompt : row.position])
        if self.with_prompt:
            return self.function(list(row.tokens[: row.num_prompt]), output, logits)
        return self.function(output, logits)


@dataclass
class _Processed:
    """A request and its processors."""

    request_id: str
    processors: list[_Processor]
    failed: bool = False

    def run(self, logits: torch.Tensor, row: SampledRow) -> torch.Tensor:
        """One row of logits through all of them. Raises LogitsProcessorError."""
        for place, processor in enumerate(self.processors, start=1):
            who = f"request {self.request_id}: logits processor {processor.name} ({place} of {len(self.processors)})"
            try:
                found = processor(logits, row)
            except Exception as error:
                raise LogitsProcessorError(f"{who} raised {type(error).__name__}: {error}") from error
            wrong = _what_is_wrong(found, logits)
            if wrong:
                raise LogitsProcessorError(f"{who} {wrong}")
            logits = found
        return logits


def _what_is_wrong(found: Any, given: torch.Tensor) -> str:
    """Empty for float32 logits of as many tokens, of which one at least may be sampled."""
    if not isinstance(found, torch.Tensor):
        return f"gave {type(found).__name__}, not a tensor"
    if found.shape != given.shape:
        return f"gave logits of shape {list(found.shape)} instead of {list(given.shape)}"
    if found.dtype != given.dtype:
        return f"gave logits of {found.dtype} instead of {given.dtype}"
    best = found.max().item()  # NaN where any is
    if math.isnan(best):
        return f"gave NaN for {int(found.isnan().sum())} of {found.numel()} tokens"
    if math.isinf(best):
        return "gave +inf" if best > 0 else "gave -inf for every token"
    return ""
