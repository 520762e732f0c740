"""How many tokens a step may have so that decoding keeps its pace."""

from __future__ import annotations

FORGET = 0.98
"""Weight of a step after the next one: some 50 steps are remembered, as attention grows with the contexts."""
REACH = 2
"""The model is believed up to this many times the largest step seen."""
FIRST_TOKENS = 64
"""A step's tokens before any step was timed."""


class StepPace:
    """Step time as a + b * tokens, fitted to the steps of late by weighted least squares.

    As long as all steps seen had one size, a is taken to be 0: that overrates every larger step, so it is safe.
    """

    def __init__(self, target_s: float) -> None:
        self._target = target_s
        self._weight = self._n = self._nn = self._t = self._nt = 0.0
        self._largest = 0

    def observe(self, num_tokens: int, seconds: float) -> None:
        """A step of `num_tokens` took `seconds`."""
        self._weight = self._weight * FORGET + 1
        self._n = self._n * FORGET + num_tokens
        self._nn = self._nn * FORGET + num_tokens * num_tokens
        self._t = self._t * FORGET + seconds
        self._nt = self._nt * FORGET + num_tokens * seconds
        self._largest = max(self._largest, num_tokens)

    def max_tokens(self) -> int:
        """Most tokens of a step within the target, prefill and decode; 0 where no step is within it."""
        if not self._largest:
            return FIRST_TOKENS
        fixed, per_token = self.model()
        reach = REACH * self._largest
        return min(reach, max(0, int((self._target - fixed) / per_token))) if per_token > 0 else reach

    def model(self) -> tuple[float, float]:
        """(a, b) in seconds and seconds per token."""
        spread = self._weight * self._nn - self._n * self._n
        if spread > 1e-9 * self._n * self._n:
            per_token = (self._weight * self._nt - self._n * self._t) / spread
            fixed = (self._t - per_token * self._n) / self._weight
            if per_token > 0 and fixed >= 0:
                return fixed, per_token
        return 0.0, self._t / self._n
