"""Row kernels in the interpreter against the torch references: norms, joins, activations, embedding, quantising."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.triton.dense_reference import activated, prepared, random_norm, random_prologue
from tests.seeds import SEED
from tokenspeed.kernels.triton.norm import act_mul, add_rows, embed_rows, norm_heads, norm_rows, quantized_twin
from tokenspeed.ops import reference
from tokenspeed.quantization.fp8 import quantize_rows

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(SEED + sum(31**i * k for i, k in enumerate(key)))


def check(got: torch.Tensor, expected: torch.Tensor, steps: float = 1.01) -> None:
    """Within a step of the dtype: float32 against float64 decides a tie differently now and then. Values that are
    differences of larger ones, up to some 16, keep the steps of those."""
    eps = torch.finfo(expected.dtype).eps
    torch.testing.assert_close(got, expected, rtol=steps * eps, atol=16 * eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind, rows, cols", [("norm", 3, 640), ("join", 2, 129), ("branch", 5, 1000)])
def test_norms_and_joins(dtype: torch.dtype, kind: str, rows: int, cols: int) -> None:
    g = generator(rows)
    x = torch.randn(rows, cols + 5, generator=g).to(dtype)[:, 5:]
    prologue = random_prologue(kind, rows, cols, dtype, g)
    assert prologue is not None
    y, joined = norm_rows(x, prologue.norm, prologue.branch, prologue.branch_norm)
    expected, expected_sum = prepared(x, prologue)
    check(y.values, expected, steps=2 if dtype != torch.float32 else 16)
    assert (joined is None) == (expected_sum is None)
    if joined is not None and expected_sum is not None:
        check(joined, expected_sum)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norm_of_heads_in_column_slices(dtype: torch.dtype) -> None:
    g = generator(1)
    q = torch.randn(3, 7 * 80, generator=g).to(dtype)[:, 80 : 6 * 80]
    norm = random_norm(80, g)
    (expected,) = reference.norm(None, [q], [norm.weight], {"eps": norm.eps, "per_head": 80})  # type: ignore[arg-type]
    check(norm_heads(q, norm), expected, steps=4)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("act", ["silu", "gelu_tanh"])
def test_activation(dtype: torch.dtype, act: str) -> None:
    x = (4 * torch.randn(2, 2 * 1100, generator=generator(2))).to(dtype)
    x[0, :3] = torch.tensor([-80.0, 80.0, 0.0])
    expected = activated(x.double(), act, dtype).to(dtype)
    got = act_mul(x, act)
    check(got, expected, steps=2 if dtype != torch.float32 else 16)
    (torch_own,) = reference.act_mul(None, [x], [], {"act": act})  # type: ignore[arg-type]
    check(got, torch_own, steps=4 if dtype != torch.float32 else 64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_add(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 3, 700, generator=generator(3)).to(dtype)
    assert (add_rows(a, b) == a + b).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("scale", [1.0, 1536**0.5])
def test_embedding(dtype: torch.dtype, index: torch.dtype, scale: float) -> None:
    """Ids outside the table, as padding may have them, give zeros and are not read."""
    table = torch.randn(11, 1100, generator=generator(4)).to(dtype)
    tokens = torch.tensor([10, -1, 0, 11, 5], dtype=index)
    got = embed_rows(tokens, table, scale)
    known = torch.tensor([0, 2, 4])
    (expected,) = reference.embed(None, [tokens[known].long()], [table], {"scale": scale})  # type: ignore[arg-type]
    assert (got[known] == expected).all()
    assert (got[torch.tensor([1, 3])] == 0).all()


def test_quantised_rows() -> None:
    g = generator(5)
    x = (torch.randn(4, 300, generator=g) * torch.tensor([[1e-3], [1.0], [700.0], [0.0]])).to(torch.bfloat16)
    expected, scale = quantize_rows(x)
    got, _ = norm_rows(x, None, quantize=True)
    assert got.scale is not None
    torch.testing.assert_close(got.scale, scale, rtol=1e-6, atol=0)
    assert (got.values.float() == expected.float()).all()
    assert (got.values[3].float() == 0).all()
    assert got.values.float().abs().amax(1).tolist() == [448, 448, 448, 0]


@pytest.mark.parametrize("kind", ["norm", "branch"])
def test_quantised_norm_and_activation(kind: str) -> None:
    """What is quantised are the rounded rows that would be written otherwise."""
    g = generator(6)
    x = torch.randn(3, 200, generator=g).to(torch.float16)
    prologue = random_prologue(kind, 3, 200, torch.float16, g)
    assert prologue is not None
    parts = (x, prologue.norm, prologue.branch, prologue.branch_norm)
    opened = act_mul(x, "silu", quantize=True)
    assert torch.equal(opened, act_mul(x, "silu"))
    for plain, packed in (
        (norm_rows(*parts)[0].values, norm_rows(*parts, quantize=True)[0]),
        (opened, quantized_twin(opened)),
    ):
        q, scale = quantize_rows(plain)
        assert packed is not None
        assert packed.scale is not None
        torch.testing.assert_close(packed.scale, scale, rtol=1e-6, atol=0)
        assert (packed.values.float() == q.float()).all()
