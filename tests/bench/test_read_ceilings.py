from __future__ import annotations

import pytest
import torch

from tokenspeed.bench import ceilings


@pytest.mark.parametrize("threads, before", [(1, 2), (3, 1), (2, 2)])
def test_measuring_uses_the_threads_it_is_told_and_leaves_those_there_were(monkeypatch, threads, before):
    seen = []
    best = ceilings._best
    monkeypatch.setattr(ceilings, "READ_BYTES", 2**20)
    monkeypatch.setattr(ceilings, "_best", lambda run: (seen.append(torch.get_num_threads()), best(run))[1])
    with ceilings.torch_threads(before):
        assert ceilings.measure_read_gbs(threads) > 0
        assert ceilings.measure_bf16_tflops(threads) > 0
        assert torch.get_num_threads() == before
    assert set(seen) == {threads}


def test_threads_come_back_after_an_error():
    before = torch.get_num_threads()
    with pytest.raises(ZeroDivisionError), ceilings.torch_threads(before + 1):
        1 / 0  # noqa: B018
    assert torch.get_num_threads() == before


def test_the_cached_ceilings_are_those_of_all_threads(monkeypatch):
    written = []
    monkeypatch.setattr(ceilings, "usable_threads", lambda: 5)
    monkeypatch.setattr(ceilings, "measure_read_gbs", lambda threads: 10.0 * threads)
    monkeypatch.setattr(ceilings, "measure_bf16_tflops", lambda threads: 0.5 * threads)
    monkeypatch.setattr(ceilings, "write_ceilings", written.append)
    found = ceilings.measure_cpu()
    assert (found.read_gbs, found.bf16_tflops, found.threads) == (50.0, 2.5, 5)
    assert written == [found]
