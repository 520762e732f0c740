"""Random weights of a model's real shapes, for benchmarks and tests without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from tokenspeed.formats.blocks import BLOCKS, row_bytes
from tokenspeed.weights.packed import PackedTensor, Weight, vector_weight
from tokenspeed.weights.spec import WeightSpec, WeightTable

STD = 0.02

_PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Where a block keeps its float16 factors, and the values with which uniformly random bytes elsewhere give values of
# standard deviation STD: of q (Q8_0, Q4_0, Q5_0), of scale * q - 7.5 * min with mean 0 (Q4_K), of scale * q (Q6_K).
_FACTORS: dict[str, tuple[tuple[int, float], ...]] = {
    "Q8_0": ((0, STD / 73.9),),
    "Q4_0": ((0, STD / 4.61),),
    "Q5_0": ((0, STD / 9.23),),
    "Q4_1": ((0, STD / 4.61), (2, -7.5 * STD / 4.61)),
    "Q5_1": ((0, STD / 9.23), (2, -15.5 * STD / 9.23)),
    "Q2_K": ((80, STD / 13.9), (82, 1.5 * STD / 13.9)),
    "Q3_K": ((108, STD / 43.3),),
    "Q4_K": ((0, STD / 256.7), (2, 7.5 * STD / 256.7)),
    "Q5_K": ((0, STD / 526.9), (2, 15.5 * STD / 526.9)),
    "Q6_K": ((208, STD / 1365),),
    "IQ4_NL": ((0, STD / 67.2),),
    "IQ4_XS": ((0, STD / 1246),),
}


def dummy_weights(
    table: WeightTable,
    fmt: Mapping[str, str] | str | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Weight]:
    """Every weight of the table, random, on `device`; the same for the same arguments.

    fmt: one format for all matrices, or a format per weight name; by default, and for names it lacks, the weight's
    own `dummy_format`. Matrix values have a mean
    within 0.003 of 0 and standard deviation 0.02; vectors are float32 around 1. Raises UnsupportedError for an unknown
    format, FormatError when a width is no whole number of its blocks.
    """
    generator = torch.Generator(device=device).manual_seed(seed)
    weights = {}
    for name, spec in table.specs.items():
        if spec.kind == "vector":
            values = torch.empty(spec.shape, dtype=torch.float32, device=device)
            weights[name] = vector_weight(spec, values.normal_(1, STD, generator=generator))
        else:
            chosen = fmt if isinstance(fmt, str) else (fmt or {}).get(name, spec.dummy_format)
            weights[name] = _random_matrix(spec, chosen, generator)
    return weights


def dummy_bytes(table: WeightTable) -> int:
    """Bytes of `dummy_weights` in their own formats."""
    vectors = sum(4 * math.prod(spec.shape) for spec in table.specs.values() if spec.kind == "vector")
    matrices = (spec for spec in table.specs.values() if spec.kind != "vector")
    return vectors + sum(spec.rows * row_bytes(spec.dummy_format, spec.cols) for spec in matrices)


def _random_matrix(spec: WeightSpec, fmt: str, generator: torch.Generator) -> Weight:
    rows, cols = spec.rows, spec.cols
    nbytes = row_bytes(fmt, cols)
    if fmt in _PLAIN:
        values = torch.empty(rows, cols, dtype=_PLAIN[fmt], device=generator.device)
        data = values.normal_(0, STD, generator=generator).view(torch.uint8)
    else:
        data = torch.empty(rows, nbytes, dtype=torch.uint8, device=generator.device).random_(generator=generator)
        _set_factors(data, fmt)
    return Weight(spec, [PackedTensor(data, fmt, rows, cols)])


def _set_factors(data: torch.Tensor, fmt: str) -> None:
    blocks = data.view(-1, BLOCKS[fmt][1])
    if fmt == "MXFP4":
        # Exponents of 2^-7 and 2^-8, so often that codes of 2.926 on average give STD.
        blocks[:, 0] = torch.where(blocks[:, 0] < 176, 120, 119)
        return
    for at, factor in _FACTORS[fmt]:
        blocks[:, at : at + 2] = torch.tensor([factor], dtype=torch.float16, device=data.device).view(torch.uint8)
