"""Weights in two planes and the screened head: the tokens are those of the full head, whatever the weights are like."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.kernels.blocks import random_rows
from tests.kernels.drawing import ask, check, draw, planes
from tests.kernels.test_cpu_linear import TOLERANCE, multiply, packed
from tests.kernels.tiers import TIERS_HERE
from tests.seeds import SEED
from tokenspeed.kernels.cpu import _walk
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.noise import gumbel, noise_keys

TEMPERATURES = (0.0, 0.01, 0.7, 1.0, 3.0)


def asks(temperature: float, count: int) -> list[SampledRow]:
    return [ask(row, temperature) for row in range(count)]


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("rows, blocks", [(1, 1), (16, 2), (37, 3), (70, 20)])
def test_products_of_planes_are_those_of_the_weights(isa: str, rows: int, blocks: int) -> None:
    rng, cols = np.random.default_rng([SEED, rows]), 32 * blocks
    data, values = random_rows("Q8_0", rows, cols, rng)
    model, matrix = planes(isa, 2, data, cols)
    row = np.empty(cols, np.float32)
    for r in range(rows):
        model.unpack_row(matrix, r, row)
        np.testing.assert_allclose(row, values[r], rtol=1e-6, atol=0)
    for count in (1, 2, 3, 5, 8, 17):
        x = rng.normal(size=(count, cols)).astype(np.float32)
        out = multiply(model, matrix, x, rows)
        size = np.linalg.norm(x, axis=1)[:, None] * np.linalg.norm(values, axis=1)
        assert (np.abs(out - x @ values.T) <= TOLERANCE * size).all()
        assert (multiply(model, matrix, x[-1:], rows)[0] == out[-1]).all()  # alone, the same bits
    whole = packed(isa, 1, [("Q8_0", data)], cols)
    np.testing.assert_allclose(out, multiply(*whole, x, rows), rtol=0, atol=2e-6 * size.max())


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("count", [1, 3, 4, 5])
def test_tokens_are_those_of_all_logits(isa: str, temperature: float, count: int) -> None:
    rng, num_tokens, cols = np.random.default_rng([SEED, count]), 2011, 320
    data, values = random_rows("Q8_0", num_tokens, cols, rng)
    model, matrix = planes(isa, 2, data, cols)
    # Some like one row, as the states of a sure model are, some like none.
    x = np.where(
        rng.random((count, 1)) < 0.5, values[rng.integers(num_tokens, size=count)], rng.normal(size=(count, cols))
    )
    assert not check(model, matrix, x.astype(np.float32), num_tokens, asks(temperature, len(x)))


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", ["equal", "zero", "huge", "coarse", "aligned", "large codes", "last wins"])
def test_rows_that_a_bound_could_get_wrong(kind: str, temperature: float) -> None:
    rng, num_tokens, cols = np.random.default_rng([SEED, 3]), 1000, 64
    data, _ = random_rows("Q8_0", num_tokens, cols, rng)
    blocks = data.reshape(num_tokens, 2, 34)
    if kind == "equal":
        blocks[:] = blocks[0]
    elif kind == "zero":
        blocks[:, :, 2:] = 0
    elif kind == "huge":
        blocks[:, :, :2] = np.array([60000.0], np.float16).view(np.uint8)
    elif kind == "coarse":  # rows that differ in the low plane alone
        blocks[:] = blocks[0]
        blocks[:, :, 2:] = (blocks[:, :, 2:] & 0xF0) | rng.integers(0, 16, size=(num_tokens, 2, 32), dtype=np.uint8)
    elif kind == "large codes":
        blocks[:, :, 2:] = rng.choice(np.array([127, 129, 128], np.uint8), size=(num_tokens, 2, 32))
    else:
        blocks[:, :, 2:] = 1
        blocks[-1, :, 2:] = 2
        blocks[:, :, :2] = np.array([0.5], np.float16).view(np.uint8)
    x = np.abs(rng.normal(size=(2, cols)))
    if (
        kind == "aligned"
    ):  # the low plane of row 700 gives all that its bound allows; 701 hides it, 100 comes close to it
        sign = rng.permutation(np.repeat([-1, 1], cols // 2)).reshape(2, 32)
        blocks[:, :, :2] = 0
        blocks[[100, 700, 701], :, :2] = np.array([0.5], np.float16).view(np.uint8)
        blocks[[100, 700], :, 2:] = np.where(sign > 0, 0x2F, 0x20)
        blocks[100, 0, 2 + np.flatnonzero(sign[0] > 0)[:2]] = 0x30, 0x2D  # seen first, for its high plane
        blocks[701, :, 2:] = np.where(sign > 0, 0x30, 0x2F)
        x[:] = sign.reshape(-1)
    model, matrix = planes("", 2, data, cols)
    assert not check(model, matrix, x.astype(np.float32), num_tokens, asks(temperature, len(x)))


def test_few_rows_are_looked_at_twice() -> None:
    rng, num_tokens, cols = np.random.default_rng([SEED, 4]), 8192, 640
    data, values = random_rows("Q8_0", num_tokens, cols, rng)
    model, matrix = planes("", 1, data, cols)
    draw(model, matrix, values[77:78].astype(np.float32), asks(0.0, 1))
    assert model.rescored < num_tokens // 20


@pytest.mark.parametrize("isa", TIERS_HERE)
def test_noise_is_the_samplers_own(isa: str) -> None:
    model = _walk.Model(1, isa)
    for seed, sample_index, position, first in [
        (0, 0, 0, 0),
        (2**64 - 3, 2**32 - 1, 2**31, 64),
        (SEED, 3, 911, 262080),
    ]:
        keys = noise_keys([seed], [sample_index], [position], torch.device("cpu"))
        wanted = gumbel(keys, torch.arange(first // 4, first // 4 + 16)[None])[0]
        found = torch.tensor(model.gumbel(seed, sample_index, position, first))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_other_formats_draw_the_same_tokens_too(temperature: float) -> None:
    rng, num_tokens, cols = np.random.default_rng([SEED, 5]), 5003, 256
    data, _ = random_rows("Q6_K", num_tokens, cols, rng)
    model, matrix = packed("", 2, [("Q6_K", data)], cols)
    x = rng.normal(size=(6, cols)).astype(np.float32)
    assert not check(model, matrix, x, num_tokens, asks(temperature, len(x)))


@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("fmt", ["Q8_0", "Q6_K"])
def test_rows_that_are_no_numbers_draw_nothing(isa: str, fmt: str, temperature: float) -> None:
    rng, num_tokens, cols = np.random.default_rng([SEED, 6]), 203, 256
    data, _ = random_rows(fmt, num_tokens, cols, rng)
    model, matrix = planes(isa, 2, data, cols) if fmt == "Q8_0" else packed(isa, 2, [(fmt, data)], cols)
    x = rng.normal(size=(3, cols)).astype(np.float32)
    broken = x.copy()
    broken[::2, rng.integers(cols)] = np.nan, rng.choice([-np.inf, np.inf])
    rows = asks(temperature, 3)
    found = draw(model, matrix, broken, rows)
    assert found == [[], draw(model, matrix, x, rows)[1], []]
    assert np.isnan(multiply(model, matrix, broken, num_tokens)[::2]).all()
