"""Routers and experts of the C++ walk, in every format and on every instruction set, against float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from tests.expert_cases import ROUTERS, Router, naive_experts, naive_route
from tests.kernels.blocks import random_rows
from tests.kernels.tiers import TIERS_HERE
from tests.seeds import SEED
from tokenspeed.kernels.cpu import _walk
from tokenspeed.kernels.cpu.registration import FORMATS

TOLERANCE = 2e-3
"""Of the norm of the largest row: activations keep 16 bits per block of 32, twice. Seen: 3e-4, of formats with least
values, whose terms cancel."""
ACTS = ("silu", "gelu_tanh", "swiglu_clamped")
SCORES = ("softmax", "sigmoid", "logits")


class Walk:
    """A walk with values but no program: ops are run alone."""

    def __init__(self, isa: str, threads: int) -> None:
        self.native = _walk.Model(threads, isa)
        self._buffers = 0

    def value(self, width: int) -> int:
        self._buffers += 1
        return self.native.add_value(self._buffers - 1, 0, width, width)

    def matrix(self, segments: list[tuple[str, np.ndarray]], cols: int) -> int:
        matrix = self.native.add_matrix(cols)
        for fmt, data in segments:
            self.native.add_segment(matrix, FORMATS.index(fmt), np.ascontiguousarray(data))
        return matrix


def routed(router: Router, logits: np.ndarray, bias: np.ndarray | None, isa: str) -> tuple[np.ndarray, np.ndarray]:
    """Ids and shares [rows, k]."""
    walk, k, rows = Walk(isa, 2), router.attrs["k"], len(logits)
    op = _walk.Op(_walk.Kind.Route)
    op.x, op.ids, op.shares = walk.value(router.experts), walk.value(k), walk.value(k)
    op.score = SCORES.index(router.attrs["score"])
    for name in ("k", "renormalize", "groups", "kept_groups", "scale"):
        setattr(op, name, router.attrs[name])
    if bias is not None:
        op.norm = walk.native.add_vector(bias)
    ids, shares = np.empty((rows, k), np.float32), np.empty((rows, k), np.float32)
    walk.native.run_alone(op, [(op.x, logits)], [(op.ids, ids), (op.shares, shares)])
    return ids.view(np.int32), shares


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
def test_route(router: Router, isa: str, seed: int) -> None:
    logits, bias = router.random(61, np.random.default_rng(seed))
    expected, shares, margins = naive_route(router, logits, bias)
    ids, got = routed(router, logits, bias, isa)
    clear = margins > 1e-5
    assert clear.sum() > 50
    assert (ids[clear] == expected[clear]).all()
    np.testing.assert_allclose(got[clear], shares[clear], rtol=4e-6)


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
def test_equal_scores_go_to_the_lower_ids(router: Router) -> None:
    ids, _ = routed(router, np.zeros((3, router.experts), np.float32), None, "")
    assert ids.tolist() == [list(range(router.attrs["k"]))] * 3


@pytest.mark.parametrize("router", ROUTERS, ids=lambda router: router.name)
def test_scores_that_are_no_numbers_choose_experts_that_there_are(router: Router) -> None:
    ids, _ = routed(router, np.full((2, router.experts), np.nan, np.float32), None, "")
    for row in ids.tolist():
        assert len(set(row)) == router.attrs["k"]
        assert set(row) <= set(range(router.experts))


@dataclass(frozen=True)
class Shape:
    """formats: of gate, up and down rows."""

    formats: tuple[str, str, str]
    hidden: int
    ff: int
    experts: int = 6
    k: int = 3
    act: str = "silu"
    biased: bool = False


class Experts:
    """Random experts, packed in a walk, with their values in float64."""

    def __init__(self, shape: Shape, isa: str, threads: int, rng: np.random.Generator) -> None:
        self.shape, self.walk = shape, Walk(isa, threads)
        gate_up, down = [], []
        values: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for _ in range(shape.experts):
            pair = [(fmt, *random_rows(fmt, shape.ff, shape.hidden, rng)) for fmt in shape.formats[:2]]
            last = (shape.formats[2], *random_rows(shape.formats[2], shape.hidden, shape.ff, rng))
            gate_up.append(self.walk.matrix([each[:2] for each in pair], shape.hidden))
            down.append(self.walk.matrix([last[:2]], shape.ff))
            values[0].append(np.concatenate([each[2] for each in pair]))
            values[1].append(last[2])
        self.matrices = [np.stack(each) for each in values]
        widths = (2 * shape.ff, shape.hidden)
        self.biases = [rng.normal(size=(shape.experts, width)).astype(np.float32) for width in widths] * shape.biased
        self.attrs: dict[str, Any] = {"act": shape.act, "alpha": 1.702, "limit": 0.8}
        self.op = self._op(self.walk.native.add_experts(gate_up, down))

    def _op(self, experts: int) -> Any:
        op, shape = _walk.Op(_walk.Kind.Experts), self.shape
        op.x, op.out = self.walk.value(shape.hidden), self.walk.value(shape.hidden)
        op.ids, op.shares = self.walk.value(shape.k), self.walk.value(shape.k)
        op.experts, op.k, op.act = experts, shape.k, ACTS.index(shape.act)
        op.alpha, op.limit = self.attrs["alpha"], self.attrs["limit"]
        if self.biases:
            op.bias, op.down_bias = (self.walk.native.add_vector(bias.ravel()) for bias in self.biases)
        return op

    def run(self, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> np.ndarray:
        out, op = np.full_like(x, np.nan), self.op
        inputs = [(op.x, x), (op.ids, ids.view(np.float32)), (op.shares, shares)]
        self.walk.native.run_alone(op, inputs, [(op.out, out)])
        return out

    def check(self, x: np.ndarray, ids: np.ndarray, shares: np.ndarray) -> None:
        expected = naive_experts(x.astype(float), ids, shares.astype(float), self.matrices, self.biases, self.attrs)
        error = np.linalg.norm(self.run(x, ids, shares) - expected, axis=1)
        assert (error <= TOLERANCE * np.linalg.norm(expected, axis=1).max()).all()


def choices(tokens: int, shape: Shape, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = rng.normal(size=(tokens, shape.hidden)).astype(np.float32)
    ids = np.stack([rng.permutation(shape.experts)[: shape.k] for _ in range(tokens)]).astype(np.int32)
    return x, ids, rng.uniform(0.1, 1, size=(tokens, shape.k)).astype(np.float32)


def width(fmt: str, blocks: int) -> int:
    return 256 * blocks if fmt.endswith(("_K", "_XS")) else 32 * blocks


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("fmt", FORMATS)
def test_experts_of_every_format(fmt: str, isa: str, seed: int) -> None:
    rng = np.random.default_rng([seed, 1])
    shape = Shape((fmt, fmt, fmt), width(fmt, 1), width(fmt, 2))
    experts = Experts(shape, isa, 2, rng)
    for tokens in (1, 2, 19):
        experts.check(*choices(tokens, shape, rng))


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("isa", TIERS_HERE)
@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("biased", [False, True])
def test_activations_biases_and_mixed_formats(act: str, biased: bool, isa: str, seed: int) -> None:
    """Sizes that are no whole tiles; gate, up and down in formats of both kinds."""
    rng = np.random.default_rng([seed, 2])
    for formats, hidden, ff in ((("BF16", "F32", "F16"), 33, 21), (("Q8_0", "BF16", "Q4_0"), 96, 32)):
        shape = Shape(formats, hidden, ff, 5, 2, act, biased)
        experts = Experts(shape, isa, 3, rng)
        for tokens in (1, 7):
            experts.check(*choices(tokens, shape, rng))


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("isa", TIERS_HERE)
def test_a_row_does_not_depend_on_its_batch_or_the_threads(isa: str, seed: int) -> None:
    shape = Shape(("Q4_K", "Q6_K", "Q8_0"), 256, 96, 7, 3)
    one, many = (Experts(shape, isa, threads, np.random.default_rng([seed, 3])) for threads in (1, 3))
    x, ids, shares = choices(23, shape, np.random.default_rng([seed, 4]))
    together = many.run(x, ids, shares)
    assert (one.run(x, ids, shares) == together).all()
    for i in (0, 11, 22):
        assert (many.run(x[i : i + 1], ids[i : i + 1], shares[i : i + 1])[0] == together[i]).all()


@pytest.mark.parametrize("seed", [SEED])
def test_all_tokens_at_one_expert_and_experts_that_nobody_chose(seed: int) -> None:
    rng = np.random.default_rng([seed, 5])
    shape = Shape(("Q8_0", "Q8_0", "Q8_0"), 64, 64, 9, 1)
    experts = Experts(shape, "", 2, rng)
    x, ids, shares = choices(33, shape, rng)
    for expert in (0, 8):
        experts.check(x, np.full_like(ids, expert), shares)
    experts.check(x, ids % 2 * 7, shares)
