"""How long outputs get, learned from those that ended and from those that still run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BUCKETS_PER_OCTAVE = 4
OCTAVES = 20
MEMORY = 1000
"""Requests after which one counts 1/e: a workload may change."""
PRIOR_WEIGHT = 0.25
"""Endings per bucket that the prior is worth: a few dozen running sequences outweigh it within some steps."""
PRIOR_SCALE = 1000
"""Tokens. The prior's hazard at length x is 1 / (x + PRIOR_SCALE): half of all outputs are longer than this, and one that
has got far is expected to get as far again, whatever the scale of the workload turns out to be."""


class OutputLengths:
    """The hazard of ending per token, constant within each of some 75 buckets of output length.

    A hazard is endings over tokens produced in the bucket (Kaplan and Meier's idea, with exposure in place of counts), so
    sequences that still run, or were cut at max_tokens, count for what they have shown: that they got so far.
    """

    def __init__(self) -> None:
        powers = np.arange(BUCKETS_PER_OCTAVE * OCTAVES + 1) / BUCKETS_PER_OCTAVE
        self._edges = np.unique(np.append(0, np.round(2**powers)))
        self._widths = np.diff(self._edges)
        prior_hazard = 1 / (self._edges[:-1] + self._widths / 2 + PRIOR_SCALE)
        self._prior_exposure = PRIOR_WEIGHT / prior_hazard
        self._endings = np.zeros_like(self._widths)
        self._exposure = np.zeros_like(self._widths)
        self._log_survival = np.zeros_like(self._edges)
        self.fit(np.zeros(0))

    def add(self, length: int, cut: bool) -> None:
        """An output of `length` tokens is over; `cut`: at a limit, it would have gone on."""
        if length < 1:
            return
        self._endings *= 1 - 1 / MEMORY
        self._exposure *= 1 - 1 / MEMORY
        self._exposure += np.clip(length - self._edges[:-1], 0, self._widths)
        if not cut:
            self._endings[np.searchsorted(self._edges, length - 1, side="right") - 1] += 1

    def fit(self, running: Floats) -> None:
        """Bring the hazards up to date, given the tokens that each running sequence has produced. [n]."""
        shown = np.clip(running[:, None] - self._edges[:-1], 0, self._widths).sum(axis=0)
        hazard = (self._endings + PRIOR_WEIGHT) / (self._exposure + shown + self._prior_exposure)
        self._log_survival[1:] = -np.cumsum(hazard * self._widths)

    def survival(self, length: Floats, more: Floats) -> Floats:
        """Probability that an output that has `length` tokens gets more than `more` further ones. [n], [h] -> [n, h]."""
        begin = np.interp(length, self._edges, self._log_survival)
        end = np.interp(length[:, None] + more, self._edges, self._log_survival)
        return np.exp(end - begin[:, None])
