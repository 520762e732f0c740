"""Log-probabilities are those of the raw logits, whatever was done to them before the draw."""

from __future__ import annotations

import pytest
import torch

from tests.seeds import SEED
from tokenspeed.contracts.step import SamplingRow
from tokenspeed.runner.edits import SampledRow
from tokenspeed.runner.logprobs import token_logprobs
from tokenspeed.runner.sampler import sample, sampler_inputs

CPU = torch.device("cpu")


@pytest.mark.parametrize("vocab", [5, 64, 50, 1003])
def test_logprobs_ranks_and_alternatives(vocab: int) -> None:
    generator = torch.Generator().manual_seed(SEED % 2**31)
    logits = torch.randn(3, vocab, generator=generator)
    tokens = torch.tensor([vocab - 1, 2, int(logits[2].argmax())])
    exact = logits.double().log_softmax(-1)
    found = token_logprobs(logits, tokens, 6).to_structs([0, 6, 4])
    for at, (entry, top) in enumerate(zip(found, [0, 6, 4], strict=True)):
        token = int(tokens[at])
        assert entry.token_id == token
        assert entry.logprob == pytest.approx(float(exact[at, token]), abs=1e-5)
        assert entry.rank == int((exact[at] > exact[at, token]).sum()) + 1
        assert entry.top_ids == exact[at].argsort(descending=True)[:top].tolist()
        assert entry.top_logprobs == pytest.approx(exact[at][entry.top_ids].tolist(), abs=1e-5)
    assert found[2].rank == 1


def test_equal_logits_come_in_the_order_of_their_ids() -> None:
    logits = torch.tensor([[-0.0, -3.0, 0.0, 7.0] + [-1.0] * 300 + [7.0, 0.0]])
    (entry,) = token_logprobs(logits, torch.tensor([2]), 8).to_structs([8])
    assert entry.top_ids == [3, 304, 0, 2, 305, 4, 5, 6]
    assert entry.rank == 3


def test_sampled_rows_report_raw_logits() -> None:
    generator = torch.Generator().manual_seed(SEED % 2**31)
    logits = torch.randn(4, 300, generator=generator)
    rows = [
        SampledRow(SamplingRow(0.0, 0, 1.0, 1, logprobs=2, banned_ids=[int(logits[0].argmax())]), [1], 1, 1),
        SampledRow(SamplingRow(1.0, 0, 1.0, 1), [1], 1, 1),
        SampledRow(SamplingRow(0.5, 3, 1.0, 1, logprobs=0, logit_bias=[(5, 99.0)]), [1], 1, 1),
        SampledRow(SamplingRow(2.0, 0, 0.9, 1, logprobs=5), [1], 1, 1),
    ]
    inputs = sampler_inputs(rows, 300, CPU)
    sampled = sample(logits, inputs)
    assert sampled.logprobs is not None
    entries = sampled.logprobs.to_structs(inputs.tops)
    assert [len(entry.top_ids) for entry in entries] == [2, 0, 5]
    exact = logits.double().log_softmax(-1)
    for at, entry in zip([0, 2, 3], entries, strict=True):
        assert entry.token_id == int(sampled.tokens[at])
        assert entry.logprob == pytest.approx(float(exact[at, entry.token_id]), abs=1e-5)
    assert entries[0].rank == 2
    assert entries[1].token_id == 5
    assert sample(logits, sampler_inputs(rows[1:2] * 4, 300, CPU)).logprobs is None
