"""Counter-based Gumbel noise: a pure function of (seed, sample index, position, token id)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch

TOKENS_PER_BLOCK = 4
"""One Philox block gives the words of four consecutive tokens."""
LOWEST_NOISE, HIGHEST_NOISE = -2.82, 22.88
"""No noise lies outside of these."""
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
_ROUNDS = 10


@dataclass(frozen=True)
class NoiseKeys:
    """What decides the noise of each row, on the device, int64: Philox keys [rounds, 2, rows, 1], samples and
    positions [rows, 1]."""

    round_keys: torch.Tensor
    samples: torch.Tensor
    positions: torch.Tensor


def noise_keys(
    seeds: Sequence[int], samples: Sequence[int], positions: Sequence[int], device: torch.device
) -> NoiseKeys:
    """Keys of rows; seeds count modulo 2^64, sample indices and positions modulo 2^32."""
    key = np.array([[seed & _LOW for seed in seeds], [seed >> 32 & _LOW for seed in seeds]], dtype=np.int64)
    step = np.array([[_W0], [_W1]], dtype=np.int64)
    rounds = np.stack([(key + i * step) & _LOW for i in range(_ROUNDS)])
    counters = np.array([samples, positions], dtype=np.int64) & _LOW
    samples_, positions_ = torch.from_numpy(counters).to(device)[:, :, None]
    return NoiseKeys(torch.from_numpy(rounds).to(device)[..., None], samples_, positions_)


def philox(keys: NoiseKeys, blocks: torch.Tensor) -> torch.Tensor:
    """uint32 words of blocks [rows, n], as int64 [rows, n, 4]: Philox4x32-10 (Salmon et al., SC 2011).

    Counter (v // 4, position, sample, 0) and key `seed` give the words of tokens 4 (v // 4) .. + 3.
    """
    if blocks.device.type != "cpu":
        return torch.stack(_rounds(blocks, keys.positions, keys.samples, keys.round_keys), dim=-1)
    # numpy's calls cost a third of torch's, and a row often asks for a few dozen blocks only.
    tensors = (blocks, keys.positions, keys.samples, keys.round_keys)
    c0, c1, c2, round_keys = (each.numpy().view(np.uint64) for each in tensors)
    return torch.from_numpy(np.stack(_rounds(c0, c1, c2, round_keys), axis=-1).view(np.int64))


_Words = TypeVar("_Words", torch.Tensor, np.ndarray)


def _rounds(c0: _Words, c1: _Words, c2: _Words, round_keys: _Words) -> tuple[_Words, _Words, _Words, _Words]:
    """In int64 the products wrap, and the sign that a shift brings in is masked off."""
    c3 = c0 ^ c0
    for k0, k1 in round_keys:
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1 = (p1 >> 32 & _LOW) ^ (c1 ^ k0), p1 & _LOW
        c2, c3 = (p0 >> 32 & _LOW) ^ (c3 ^ k1), p0 & _LOW
    return c0, c1, c2, c3


def gumbel(keys: NoiseKeys, blocks: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise of the tokens of blocks [rows, n], float32 [rows, 4 n]."""
    return _gumbel_of_words(philox(keys, blocks)).flatten(1)


def _gumbel_of_words(words: torch.Tensor) -> torch.Tensor:
    """-log(-log(1 - u)) with u on the grid (word + 1/2) / 2^32: small u, that is large noise, keep full precision."""
    u = words.float().add_(0.5).mul_(2.0**-32).clamp_(max=1 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()
