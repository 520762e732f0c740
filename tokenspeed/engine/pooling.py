"""Embeddings, scores and classes: from what a model gives in place of tokens to what callers get. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from tokenspeed.contracts.errors import ParameterError
from tokenspeed.contracts.step import Pooling
from tokenspeed.engine.output import RequestOutput

Floats = npt.NDArray[np.float32]
WAYS = ("last", "mean")
"""Of making one vector of a prompt's hidden states."""
Result = TypeVar("Result")


@dataclass(frozen=True)
class EmbeddingOutput:
    """One vector."""

    embedding: list[float]


@dataclass(frozen=True)
class ScoringOutput:
    """How well a document answers a query, from 0 to 1."""

    score: float


@dataclass(frozen=True)
class ClassificationOutput:
    """The probability of each label; of a lone one, its own against its absence."""

    probs: list[float]


@dataclass(frozen=True)
class PooledOutput(Generic[Result]):
    """A request and what it gave, in the shape of vLLM's offline API."""

    request_id: str
    outputs: Result
    prompt_token_ids: list[int]
    num_cached_tokens: int
    finished: bool = True

    @classmethod
    def of(cls, output: RequestOutput, result: Result) -> PooledOutput[Result]:
        """`result` was made of the output's `pooled`."""
        return cls(output.request_id, result, output.prompt_token_ids, output.num_cached_tokens)


def embedding_pooling(way: str, dimensions: int | None, hidden_size: int) -> Pooling:
    """What to ask of the engine. Raises ParameterError for an unknown way, and for more dimensions than there are."""
    if way not in WAYS:
        raise ParameterError(f"pooling must be one of {', '.join(WAYS)}, got {way!r}")
    if dimensions is not None and (type(dimensions) is not int or not 1 <= dimensions <= hidden_size):
        raise ParameterError(f"dimensions must be from 1 to {hidden_size}, those of this model, got {dimensions!r}")
    return Pooling("embedding", mean=way == "mean")


def embedding_of(output: RequestOutput, normalize: bool, dimensions: int | None) -> Floats:
    """The first `dimensions` numbers of what was pooled, then with length 1 where `normalize`: float32 [dimensions]."""
    values = pooled_of(output)[:dimensions]
    if not normalize:
        return values
    length = float(np.linalg.norm(values.astype(np.float64)))
    return values if length == 0 else (values / length).astype(np.float32)


def probabilities(logits: Floats) -> list[float]:
    """Softmax of several logits, the logistic function of a lone one."""
    wide = logits.astype(np.float64)
    if len(wide) == 1:
        wide = np.array([wide[0], 0.0])
    weights = np.exp(wide - wide.max())
    found: list[float] = (weights / weights.sum())[: len(logits)].tolist()
    return found


def pooled_of(output: RequestOutput) -> Floats:
    """What a finished request gave. Raises RuntimeError where it was aborted."""
    if output.pooled is None:
        raise RuntimeError(f"request {output.request_id!r} ended without a result")
    return output.pooled
