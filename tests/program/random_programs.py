"""Runs a program record by record through the references, for tests."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tokenspeed.ops.reference import REFERENCE, StepView
from tokenspeed.program.program import Program


def run(program: Program, weights: dict[str, torch.Tensor], view: StepView) -> dict[str, torch.Tensor]:
    """Outputs of a program, by name."""
    values = {program.inputs["tokens"]: view.tokens}
    for record in program.records:
        for part in record.plain():
            inputs, parts = [values[v] for v in part.inputs], [weights[name] for name in part.weights]
            outputs = REFERENCE[part.op](view, inputs, parts, part.attrs)
            values.update(zip(part.outputs, outputs, strict=True))
    return {name: values[v] for name, v in program.outputs.items()}


def random_weights(program: Program, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights of the program's shapes: matrices of fan-in scale, vectors around 1."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in program.weight_shapes.items():
        values = torch.randn(shape, generator=generator)
        weights[name] = (values / shape[-1] ** 0.5).to(dtype) if len(shape) == 2 else 1 + 0.3 * values
    return weights


def random_step(
    seed: int, *, layers: int, kv_heads: int, head_dim: int, vocab: int = 37, page_size: int = 4
) -> Callable[[], StepView]:
    """A step of three sequences at different depths, over scattered pages that already hold random keys and values.

    Returns a maker, so that a program that writes into the pages can be run twice from the same state.
    """
    generator = torch.Generator().manual_seed(seed)
    fed, before = [3, 1, 5], [6, 9, 0]
    pages = torch.randperm(16, generator=generator).tolist()
    tables = [[pages.pop() for _ in range(-(-(f + b) // page_size))] for f, b in zip(fed, before, strict=True)]
    positions = [p for f, b in zip(fed, before, strict=True) for p in range(b, b + f)]
    owners = [i for i, f in enumerate(fed) for _ in range(f)]
    slots = [tables[i][p // page_size] * page_size + p % page_size for i, p in zip(owners, positions, strict=True)]
    tokens = torch.randint(0, vocab, (sum(fed),), generator=generator)
    kv = torch.randn(16, layers, 2, page_size, kv_heads, head_dim, generator=generator)

    def make() -> StepView:
        return StepView(
            tokens=tokens,
            positions=torch.tensor(positions),
            slots=torch.tensor([slots]),
            query_start=[0, 3, 4, 9],
            context=[f + b for f, b in zip(fed, before, strict=True)],
            block_tables=[[torch.tensor(table)] for table in tables],
            places=tuple((0, layer) for layer in range(layers)),
            kv=kv.clone(),
            rows=torch.tensor([2, 3, 8]),
        )

    return make
