"""Log-probabilities, ranks and alternatives from the kernels, against the torch ones."""

from __future__ import annotations

import random

import pytest
import torch

from tests.kernels.triton.sampling_rows import device_rows
from tests.runner.test_sampler import peaked, sampling
from tests.seeds import SEED
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.kernels.triton.logprobs import DeviceLogprobs, token_logprobs
from tokenspeed.runner import logprobs as runner_logprobs
from tokenspeed.runner.edits import SampledRow


def found_for(logits: torch.Tensor, tokens: list[int], tops: list[int], top: int, padding: int = -1) -> DeviceLogprobs:
    rng = random.Random(SEED)
    rows = [SampledRow(sampling(logprobs=wanted), [1], 1, 1) for wanted in tops]
    on_device = device_rows(rows, logits.shape[1], rng)
    slots = on_device.slots.clone()
    if padding >= 0:
        slots[padding] = -1
    return token_logprobs(logits, torch.tensor(tokens, dtype=torch.int32), slots, on_device.state, top)


@pytest.mark.parametrize(
    "vocab, dtype", [(3, torch.float32), (17, torch.float16), (64, torch.bfloat16), (4200, torch.float32)]
)
@pytest.mark.parametrize("seed", [SEED])
def test_equal_the_torch_ones(vocab: int, dtype: torch.dtype, seed: int) -> None:
    rng, tops, top = random.Random(seed), [20, 0, 15, -1, 1, 64], 20
    logits = peaked(seed % 2**31, len(tops), vocab).to(dtype)
    logits[2, (vocab + 1) // 2 :] = -torch.inf
    tokens = [rng.randrange((vocab + 1) // 2) for _ in tops]
    found = found_for(logits, tokens, tops, top)
    exact = runner_logprobs.token_logprobs(logits.float(), torch.tensor(tokens), top)
    width = exact.top_ids.shape[1]
    for row, wanted in enumerate(tops):
        shown = max(0, min(wanted, width))
        assert found.top_ids[row].tolist() == exact.top_ids[row, :shown].tolist() + [0] * (top - shown)
        torch.testing.assert_close(
            found.top_logprobs[row, :shown], exact.top_logprobs[row, :shown], rtol=1e-5, atol=1e-5
        )
        if wanted >= 0:
            assert found.logprobs[row].item() == pytest.approx(exact.logprobs[row].item(), abs=1e-5)
        assert found.ranks[row] == (exact.ranks[row] if wanted >= 0 else 0)


def test_equal_logits_come_in_the_order_of_their_ids() -> None:
    logits = torch.tensor([[-0.0, -3.0, 0.0, 7.0] + [-1.0] * 300 + [7.0, 0.0]] * 2)
    found = found_for(logits, [2, 2], [8, 8], 8, padding=1)
    assert found.top_ids.tolist() == [[3, 304, 0, 2, 305, 4, 5, 6], [0] * 8]
    assert found.ranks.tolist() == [3, 0]
    assert found.logprobs[1] == 0


def test_too_many_alternatives_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="65 alternatives per token, at most 64"):
        found_for(peaked(1, 1, 9), [1], [3], 65)
