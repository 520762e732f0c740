"""Every kind of rotation against the frequencies and scales that transformers computes from the same config."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.seeds import SEED
from tokenspeed.contracts.errors import FormatError, UnsupportedError
from tokenspeed.ops.reference import StepView, frequencies, rope
from tokenspeed.ops.rope import Rope, no_rope, rope_from_hf

ORIGINAL, CONTEXT = 256, 2048
CPU = torch.device("cpu")


def oracle(scaling: dict[str, Any], head_dim: int, part: float, length: int) -> tuple[torch.Tensor, float]:
    """Frequencies and scale of transformers for a sequence of `length`."""
    parameters = scaling | {"partial_rotary_factor": part}
    sizes = {"hidden_size": 4 * head_dim, "num_attention_heads": 4, "head_dim": head_dim}
    config = AutoConfig.for_model("llama", max_position_embeddings=CONTEXT, rope_parameters=parameters, **sizes)
    return ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, CPU, seq_len=length)


def scalings(seed: int) -> dict[str, dict[str, Any]]:
    draw = random.Random(seed)
    theta, factor = 10 ** draw.uniform(3.5, 6.5), draw.uniform(1.5, 12)
    base = {"rope_theta": theta, "factor": factor}
    yarn = base | {"rope_type": "yarn", "original_max_position_embeddings": ORIGINAL}
    return {
        "linear": base | {"rope_type": "linear"},
        "dynamic": base | {"rope_type": "dynamic"},
        "yarn": yarn,
        "yarn-context": yarn | {"factor": None},
        "yarn-scale": yarn | {"attention_factor": draw.uniform(0.5, 2)},
        "yarn-mscale": yarn | {"mscale": draw.uniform(0.5, 2), "mscale_all_dim": draw.uniform(0.5, 2)},
        "yarn-blend": yarn | {"beta_fast": draw.uniform(8, 20), "beta_slow": draw.uniform(1, 4), "truncate": False},
        "yarn-whole": {"rope_type": "yarn", "rope_theta": theta, "factor": factor},
    }


@pytest.mark.parametrize("seed", [SEED, SEED + 1])
@pytest.mark.parametrize("head_dim, part", [(64, 1.0), (80, 0.4), (36, 0.5)])
@pytest.mark.parametrize("name", scalings(0))
def test_it_turns_as_transformers_does(name, head_dim, part, seed):
    scaling = scalings(seed)[name]
    wanted, scale = oracle(scaling, head_dim, part, CONTEXT)
    ours = rope_from_hf(scaling["rope_theta"], int(head_dim * part), scaling, CONTEXT)
    torch.testing.assert_close(frequencies(ours, CPU), wanted, rtol=2e-5, atol=0)
    assert ours.scale == pytest.approx(scale)
    assert ours.dim == 2 * len(wanted)


@pytest.mark.parametrize("seed", [SEED])
@pytest.mark.parametrize("change", [{}, {"factor": 3.7}, {"attention_factor": 1.4}])
@pytest.mark.parametrize("kind", ["longrope", "su"])
@pytest.mark.parametrize("length", [ORIGINAL, ORIGINAL + 1])
def test_longrope_has_two_lists(length, kind, change, seed):
    draw = random.Random(seed)
    lists = {
        f"{name}_factor": [draw.uniform(1, most) for _ in range(12)] for name, most in (("short", 2), ("long", 40))
    }
    scaling = (
        {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL} | lists | change
    )
    wanted, scale = oracle(scaling, 48, 0.5, length)
    given = scaling | {"rope_type": kind}
    ours = rope_from_hf(1e4, 24, given, CONTEXT, long=length > ORIGINAL)
    torch.testing.assert_close(frequencies(ours, CPU), wanted, rtol=1e-5, atol=0)
    assert ours.scale == pytest.approx(scale)
    with pytest.raises(FormatError, match="12 factors for 24 pairs"):
        rope_from_hf(1e4, 48, scaling, CONTEXT)


def turned(ours: Rope, x: torch.Tensor, positions: list[int]) -> torch.Tensor:
    count = len(positions)
    view = StepView(
        tokens=torch.zeros(count, dtype=torch.int64),
        positions=torch.tensor(positions),
        slots=torch.zeros(1, count, dtype=torch.int64),
        query_start=[0, count],
        context=[count],
        block_tables=[],
        places=(),
        kv=torch.zeros(0),
        rows=torch.zeros(0, dtype=torch.int64),
    )
    return rope(view, [x, x[:, :32]], [], {"rope": ours, "head_dim": 32})[0]


@pytest.mark.parametrize("seed", [SEED])
def test_no_rotation_leaves_every_bit(seed):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    assert torch.equal(turned(no_rope(32), x, [0, 5, 10**6]), x)


@pytest.mark.parametrize("seed", [SEED])
def test_the_scale_is_that_of_columns_that_turn(seed):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(seed))
    plain, scaled = (turned(Rope(1e4, 12, scale=scale), x, [0, 5, 999]) for scale in (1.0, 1.7))
    heads = plain.reshape(3, 2, 32).clone()
    heads[..., :12] *= 1.7
    torch.testing.assert_close(scaled.reshape(3, 2, 32), heads, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "scaling, dim, word",
    [
        ({"rope_type": "proportional"}, 32, "proportional"),
        ({"rope_type": "dynamic"}, 32, "factor"),
        ({"rope_type": "linear"}, 32, "factor"),
        ({"rope_type": "longrope", "short_factor": [1.0] * 16}, 32, "long_factor"),
        ({"rope_type": "yarn", "original_max_position_embeddings": "x"}, 32, "original_max_position_embeddings"),
        (None, 31, "31 columns"),
        (None, 0, "0 columns"),
    ],
)
def test_what_it_lacks_or_does_not_know_is_named(scaling, dim, word):
    with pytest.raises((FormatError, UnsupportedError), match=word):
        rope_from_hf(1e4, dim, scaling, CONTEXT)
