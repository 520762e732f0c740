"""Every family through the C++ walk: log-probabilities as transformers computes them, and greedy tokens."""

from __future__ import annotations

import pytest

from tests.parity_cases import CASES, MOE_FAMILY_CASES, ROUTING_MARGIN
from tests.parity_tools import oracle_logits, random_prompt, routing_margin
from tokenspeed import LLM, SamplingParams

BOUND = 2e-3
"""Of |dlogprob| of the 20 best: activations keep 16 bits per block of 32."""
MARGIN = 0.02
"""Between the logits of the best tokens, beyond which both must choose the same."""
NEW_TOKENS = 32


RUNS = [
    *(pytest.param(name, "BF16") for name in CASES),
    *(pytest.param(name, "F32", marks=pytest.mark.slow) for name in CASES),
    *(pytest.param(name, "gguf-Q4_0") for name in MOE_FAMILY_CASES),
    pytest.param("gpt_oss", "gguf-MXFP4"),
]


@pytest.mark.parametrize("name, fmt", RUNS)
def test_logprobs_and_tokens(tiny, name: str, fmt: str) -> None:
    made = tiny(name, fmt)
    llm = LLM(str(made.path), dtype="bfloat16", kv_cache_dtype="float32", threads=2)
    assert llm.core.backend.name == "cpu"
    prompt = random_prompt(40, made.case.seed)
    params = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, prompt_logprobs=20, ignore_eos=True)
    (output,) = llm.generate(prompt_token_ids=prompt, sampling_params=params, use_tqdm=False)
    tokens = output.outputs[0].token_ids
    assert routing_margin(made.oracle, prompt + tokens[:-1]) > ROUTING_MARGIN, "choose another seed"
    expected = oracle_logits(made.oracle, prompt + tokens[:-1])
    assert output.prompt_logprobs is not None
    logprobs = expected.log_softmax(-1)
    rows = enumerate(output.prompt_logprobs[1:])
    errors = [abs(e.logprob - float(logprobs[row, token])) for row, es in rows for token, e in (es or {}).items()]
    assert len(errors) >= 39 * 20
    assert max(errors) < BOUND
    assert len(tokens) == NEW_TOKENS
    best = expected[len(prompt) - 1 :].topk(2)
    for token, values, ids in zip(tokens, best.values.tolist(), best.indices.tolist(), strict=True):
        assert token == ids[0] or (values[0] - values[1] < MARGIN and token == ids[1])
