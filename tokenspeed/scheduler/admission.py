"""Whether one more sequence may start: a forecast of the pages that all will hold."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

import numpy as np

from tokenspeed.cache.manager import CacheManager
from tokenspeed.scheduler.lengths import Floats, OutputLengths
from tokenspeed.scheduler.sequence import Sequence

RISK = 2.0
"""Standard deviations of the forecast that must fit: the watermark. Measured by `tokenspeed.bench.simulate`, sequences
at once as a part of what an oracle runs, and preemptions: 1.0 gives 100 % and 12 %, 1.5 99.8 % and 2.6 %, 2.0 99.2 %
and 0.6 %, 3.0 97.4 % and none. Short prompts, outputs of mean 1,500: 2.0 gives 86 % and 1.7 %, 3.0 77 % and none."""
REFRESH_STEPS = 64
"""Steps that a forecast is used for while no sequence comes or goes."""
HORIZONS = 23
"""Moments of the future looked at: page_size * 2^(i / 2) steps ahead, up to 2,048 pages."""


class AdmissionPolicy(Protocol):
    """What the scheduler asks. `version` changes whenever a refused sequence may be worth another try."""

    version: int

    def admits(self, newcomer: Sequence, num_shared: int, running: Collection[Sequence], step_id: int) -> bool:
        """Whether `newcomer`, of whose pages `num_shared` are held already, may join; if so it is taken to do so."""
        ...

    def refresh(self, running: Collection[Sequence], step_id: int) -> None:
        """Look at the present if that is due."""
        ...

    def ended(self, num_output: int, cut: bool) -> None:
        """A sequence is over, with so many tokens; `cut`: at its limit."""
        ...

    def changed(self) -> None:
        """Pages were given back."""
        ...


class ForecastAdmission:
    """Admits while the pages held, at every horizon, stay within the pool with a margin.

    A sequence that has produced a tokens runs on for t more with probability S(a + t) / S(a), S being learned
    (`OutputLengths`); by then it holds its pages and those of t tokens more. Or it has ended, and what only it held is
    back. Mean and variance of the sum over all sequences give the forecast: mean + RISK * deviation, or what they
    hold if none ends where that is less. Near the present that leaves a watermark for growth before the next one ends;
    far ahead it holds back a wave of long outputs.
    """

    def __init__(self, cache: CacheManager, risk: float = RISK) -> None:
        self.version = 0
        self._cache = cache
        self._risk = risk
        self._lengths = OutputLengths()
        self._horizons = np.append(0, cache.page_size * 2.0 ** (np.arange(HORIZONS) / 2))
        self._windows = np.array([group.window or np.inf for group in cache.groups])
        self._forecast = np.zeros((3, HORIZONS + 1))
        self._stale = True
        self._made_at = 0

    def refresh(self, running: Collection[Sequence], step_id: int) -> None:
        """Make a new forecast if one is due: O(running * HORIZONS)."""
        if not self._stale and step_id - self._made_at < REFRESH_STEPS:
            return
        self._stale, self._made_at = False, step_id
        self.version += 1
        self._lengths.fit(np.array([sequence.num_output for sequence in running], dtype=np.float64))
        held = np.array([sequence.table.num_held for sequence in running], dtype=np.float64)
        shared = np.array([sequence.table.num_shared for sequence in running], dtype=np.float64)
        self._forecast = self._demand(list(running), held, shared)
        self._forecast[:2] += self._cache.num_held

    def admits(self, newcomer: Sequence, num_shared: int, running: Collection[Sequence], step_id: int) -> bool:
        """An empty engine takes anyone, without a forecast: that a sequence fits alone was checked when it came."""
        if not (running or self._cache.num_held):
            self._stale = True
            return True
        self.refresh(running, step_id)
        shared = np.array([float(num_shared)])
        most, mean, variance = self._forecast + self._demand([newcomer], shared, shared)
        peak = np.minimum(most, mean + self._risk * np.sqrt(variance)).max()
        admitted = bool(peak <= self._cache.num_pages)
        self._stale = self._stale or admitted
        return admitted

    def ended(self, num_output: int, cut: bool) -> None:
        """Learn a length."""
        self._lengths.add(num_output, cut)

    def changed(self) -> None:
        """The next question needs a new forecast."""
        self._stale = True

    def _demand(self, sequences: list[Sequence], held: Floats, shared: Floats) -> Floats:
        """Pages beyond those held now that will be held at each horizon: the most there can be, mean, and variance.
        [3, horizons]."""
        tokens = np.array([len(sequence.token_ids) for sequence in sequences], dtype=np.float64)
        output = np.array([sequence.num_output for sequence in sequences], dtype=np.float64)
        left = np.array([sequence.live.max_len for sequence in sequences], dtype=np.float64) - tokens
        size = self._cache.page_size
        needed = np.ceil(np.minimum(tokens[:, None], self._windows) / size).sum(axis=1)
        missing = np.maximum(needed - held, 0)
        later = tokens[:, None] + np.minimum(self._horizons, left[:, None])
        growth = sum(np.minimum(later, w) - np.minimum(tokens, w)[:, None] for w in self._windows) / size
        alive = self._lengths.survival(output, self._horizons) * (self._horizons < left[:, None])
        private = (held + missing - shared)[:, None]
        most = missing.sum() + growth.sum(axis=0)
        mean = missing.sum() + (alive * growth - (1 - alive) * private).sum(axis=0)
        variance = (alive * (1 - alive) * (growth + private) ** 2).sum(axis=0)
        return np.stack((most, mean, variance))
