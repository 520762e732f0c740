"""The fused program of every family computes what the recorded one does, under the plans the executor makes."""

from __future__ import annotations

import pytest
import torch

from tests.parity_tools import CASES, Walker, load, random_prompt
from tokenspeed.program.fuse import fuse

# What the table must find in each family's layers; without these the comparison would compare a program with itself.
PRE_NORM_OPS = {"join_norm_linear", "join_norm_linear_act"}
SANDWICH_OPS = {"branch_join_norm_linear", "branch_join_norm_linear_act"}
MOE_OPS = {"join_norm_linear", "join_norm_route"}
FUSED_OPS = {
    "llama": PRE_NORM_OPS | {"rope_attention"},
    "qwen2": PRE_NORM_OPS | {"rope_attention"},
    "qwen3": PRE_NORM_OPS | {"qk_norm_rope_attention"},
    "gemma3_text": SANDWICH_OPS | {"qk_norm_rope_attention"},
    "gemma2": SANDWICH_OPS | {"rope_attention"},
    "glm4": SANDWICH_OPS | {"rope_attention"},
    "olmo2": {"linear_act", "rope_attention"},
    **dict.fromkeys(("mixtral", "gpt_oss", "minimax_m2"), MOE_OPS | {"rope_attention"}),
    "qwen3_moe": MOE_OPS | {"qk_norm_rope_attention"},
    "glm4_moe": MOE_OPS,
    **dict.fromkeys(("mistral", "ministral", "phi3", "smollm3", "granite"), PRE_NORM_OPS | {"rope_attention"}),
}


@pytest.mark.parametrize("name", CASES)
def test_fused_agrees_with_plain(tiny, name):
    model = load(tiny(name, "F32").path)
    plain = Walker(model, model.definition.program())
    fused = Walker(model)
    assert FUSED_OPS[CASES[name].model_type] <= {record.op for record in model.program.records}
    assert not any(record.parts for record in plain.model.program.records)
    prompt = random_prompt(41, CASES[name].seed)
    for start, end in ((0, 33), (33, 34), (34, 41)):  # prefill, decode, a chunk in between
        expected, logits = (walker.feed(prompt[start:end], start)["logits"] for walker in (plain, fused))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fused.arena.kv, plain.arena.kv, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_fused_holds_every_plain_record_once(tiny, name):
    program = load(tiny(name, "F32").path).definition.program()
    grouped = [part for record in fuse(program).records for part in record.plain()]
    assert len(grouped) == len(program.records)
    assert set(map(id, grouped)) == set(map(id, program.records))


def test_a_plan_serves_its_whole_bucket(tiny):
    """Buckets differ by token count; logits must not."""
    model = load(tiny("gemma3", "F32").path)
    prompt = random_prompt(40, 5)
    whole = Walker(model)
    expected = whole.logits(prompt)
    assert whole.backend.plan_for(40).bucket == 64
    for chunk in (1, 2, 5, 17):
        torch.testing.assert_close(Walker(model).logits(prompt, chunk), expected, atol=1e-5, rtol=1e-5)
