"""Perplexity of a text as llama.cpp's `llama-perplexity` measures it, by the engine's own log-probabilities.

The text becomes tokens once, a bos in front where the model's tokenizer adds one. They are cut into pieces of `context`
tokens; what does not fill one is left out. The first token of each piece becomes the bos. Of a piece, the tokens behind
its first context / 2 + 1 are scored; all pieces together give exp of the mean negative log-probability.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.tokenizer.base import Tokenizer

CONTEXT = 512
FEWEST = 2
"""Pieces."""
AT_ONCE = 8
"""Pieces that are given to the engine together."""


@dataclass(frozen=True)
class Perplexity:
    """value: exp of the mean negative log-probability. error: its standard error. tokens: that were scored."""

    value: float
    error: float
    tokens: int
    pieces: int
    context: int

    def text(self) -> str:
        """One line."""
        return (
            f"perplexity {self.value:.4f} +/- {self.error:.4f} ({self.tokens} tokens of {self.pieces} pieces of "
            f"{self.context})"
        )


def pieces_of(tokenizer: Tokenizer, text: str, context: int, most: int | None = None) -> list[list[int]]:
    """Token ids of the first `most` pieces. Raises ConfigError for a context of fewer than 4 tokens, and for a text of
    fewer than two pieces."""
    if context < 4:
        raise ConfigError(f"--ctx-size must be at least 4, got {context}")
    bos = tokenizer.encode("")[:1]
    ids = [*bos, *tokenizer.encode(text, add_special_tokens=False)]
    count = len(ids) // context
    if count < FEWEST:
        raise ConfigError(
            f"the text has {len(ids)} tokens, at least {FEWEST * context} are needed for pieces of {context}"
        )
    cut = [ids[at * context : (at + 1) * context] for at in range(count)][:most]
    return [[*bos, *piece[len(bos) :]] for piece in cut]


def perplexity_of(losses: Sequence[float], pieces: int, context: int) -> Perplexity:
    """From the negative log-probabilities of all scored tokens."""
    values = np.array(losses, np.float64)
    mean = float(values.mean())
    spread = max(float((values * values).mean()) - mean * mean, 0.0)
    error = math.exp(mean) * math.sqrt(spread / max(len(values) - 1, 1))
    return Perplexity(math.exp(mean), error, len(values), pieces, context)


def measure(llm: LLM, text: str, context: int = CONTEXT, most: int | None = None) -> Iterator[Perplexity]:
    """The perplexity of the pieces so far, some at a time. Raises what `pieces_of` and `LLM.generate` raise."""
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    pieces, losses = pieces_of(llm.get_tokenizer(), text, context, most), list[float]()
    for start in range(0, len(pieces), AT_ONCE):
        some = pieces[start : start + AT_ONCE]
        for output in llm.generate(prompt_token_ids=some, sampling_params=params, use_tqdm=False):
            assert output.prompt_logprobs is not None
            scored = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
            told = [entry[token].logprob for token, entry in scored if entry is not None]  # none of the first token
            losses += [-value for value in told[context // 2 :]]
        yield perplexity_of(losses, start + len(some), context)
