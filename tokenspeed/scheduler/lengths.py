"""How long outputs get, learned from those that ended and from those that still run."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

BUCKETS_PER_OCTAVE = 4
OCTAVES = 20
MEMORY = 1000
"""Requests after which one counts 1/e: a workload may change."""
PRIOR_WEIGHT = 0.1
"""Endings per bucket that the prior is worth: a few dozen running sequences outweigh it within some steps."""
PRIOR_SCALE = 1000
"""Tokens. The prior's hazard at length x is 1 / (x + PRIOR_SCALE): half of all outputs are longer than this, and one
that has got far has even odds to get as far again, whatever the scale of the workload turns out to be."""


class OutputLengths:
    """For each of some 75 buckets of output length, the share of those that enter it that end in it.

    Kaplan and Meier's estimate, on buckets: sequences that still run, or were cut at max_tokens, count for what they
    have shown. One that is inside a bucket counts by the part of it that it has passed. Endings are foretold for the
    end of their bucket: late rather than early, since pages come back only then.
    """

    def __init__(self) -> None:
        powers = np.arange(BUCKETS_PER_OCTAVE * OCTAVES + 1) / BUCKETS_PER_OCTAVE
        self._edges = np.unique(np.append(0, np.round(2**powers)))
        self._widths = np.diff(self._edges)
        prior_share = self._widths / (self._edges[1:] + PRIOR_SCALE)
        self._prior_at_risk = PRIOR_WEIGHT / prior_share
        self._endings = np.zeros_like(self._widths)
        self._at_risk = np.zeros_like(self._widths)
        self._log_survival = np.zeros_like(self._edges)
        self.fit(np.zeros(0))

    def add(self, length: int, cut: bool) -> None:
        """An output of `length` tokens is over; `cut`: at a limit, it would have gone on."""
        if length < 1:
            return
        self._endings *= 1 - 1 / MEMORY
        self._at_risk *= 1 - 1 / MEMORY
        if cut:
            self._at_risk += self._passed(np.array([length]))
        else:
            bucket = np.searchsorted(self._edges, length - 1, side="right") - 1
            self._at_risk[: bucket + 1] += 1
            self._endings[bucket] += 1

    def fit(self, running: Floats) -> None:
        """Bring the estimate up to date, given the tokens that each running sequence has produced. [n]."""
        at_risk = self._at_risk + self._passed(running) + self._prior_at_risk
        self._log_survival[1:] = np.cumsum(np.log1p(-(self._endings + PRIOR_WEIGHT) / at_risk))

    def survival(self, length: Floats, more: Floats) -> Floats:
        """Probability that an output of `length` tokens so far gets over `more` further ones. [n], [h] -> [n, h]."""
        begin = np.searchsorted(self._edges, length, side="right") - 1
        end = np.searchsorted(self._edges, length[:, None] + more, side="right") - 1
        return np.exp(self._log_survival[end] - self._log_survival[begin][:, None])

    def _passed(self, lengths: Floats) -> Floats:
        """The part of each bucket that outputs have passed, summed over them."""
        return np.clip((lengths[:, None] - self._edges[:-1]) / self._widths, 0, 1).sum(axis=0)
