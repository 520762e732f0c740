"""Tokens drawn by the native head, beside those that the sampler draws from the same logits."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from tests.kernels.test_cpu_linear import multiply
from tests.seeds import SEED
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.kernels.cpu import _walk
from tokenspeed.kernels.cpu.registration import PLANES
from tokenspeed.runner.cpu_backend import native_ask
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.sampler import sample, sampler_inputs, settle

CPU = torch.device("cpu")


def planes(isa: str, threads: int, data: np.ndarray, cols: int) -> tuple[_walk.Model, int]:
    model = _walk.Model(threads, isa)
    matrix = model.add_matrix(cols)
    model.add_segment(matrix, PLANES, data)
    return model, matrix


def ask(
    row: int, temperature: float, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, seed: int = SEED
) -> SampledRow:
    sampling = SamplingRow(temperature, top_k, top_p, seed + 5 * row, sample_index=row, min_p=min_p)
    return SampledRow(sampling, [], 0, 7 + row)


def draw(model: _walk.Model, matrix: int, x: np.ndarray, rows: Sequence[SampledRow]) -> list[list[tuple[int, float]]]:
    return model.draw(matrix, x, [native_ask(row) for row in rows])


def sampled(logits: np.ndarray, rows: Sequence[SampledRow]) -> list[int]:
    inputs = sampler_inputs(rows, logits.shape[1], CPU)
    return sample(torch.from_numpy(logits), inputs).tokens.tolist()


def check(model: _walk.Model, matrix: int, x: np.ndarray, num_tokens: int, rows: Sequence[SampledRow]) -> int:
    """The tokens drawn are those the sampler draws from the logits, and so are the logits they come with. Gives the
    number of rows that are left to the sampler, which only top_p may do."""
    logits = multiply(model, matrix, x, num_tokens)
    wanted = sampled(logits, rows)
    left = 0
    for row, candidates in enumerate(draw(model, matrix, x, rows)):
        if not candidates:
            assert rows[row].sampling.top_p < 1
            left += 1
            continue
        token = candidates[0][0] if len(candidates) == 1 else settle(candidates, rows[row])
        assert token == wanted[row], rows[row].sampling
        assert all(logits[row, at] == np.float32(logit) for at, logit in candidates)
    return left
