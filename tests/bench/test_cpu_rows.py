from __future__ import annotations

import random
import statistics
from types import SimpleNamespace

import pytest

from tokenspeed.bench import cpu_rows
from tokenspeed.bench.record import Record
from tokenspeed.engine.output import RequestMetrics

TARGETS = {
    "cpu.decode128.t1": 1.6,
    "cpu.decode128.t2": 1.6,
    "cpu.decode128.t1.screened": 2.0,
    "cpu.decode128.t2.screened": 2.0,
    "cpu.decode128.sampled.t1": 1.4,
    "cpu.decode128.sampled.t2": 1.4,
    "cpu.decode128.sampled.t1.screened": 1.7,
    "cpu.decode128.sampled.t2.screened": 1.7,
    "cpu.decode128.sampled_top.t1": 1.4,
    "cpu.decode128.sampled_top.t2": 1.4,
    "cpu.decode128.sampled_top.t1.screened": None,
    "cpu.decode128.sampled_top.t2.screened": None,
    "cpu.decode_d2048.t1": 1.6,
    "cpu.decode_d2048.t2": 1.5,
    "cpu.decode_d2048.t1.screened": 1.9,
    "cpu.decode_d2048.t2.screened": 1.7,
    "cpu.prefill512.t1": 1.5,
    "cpu.prefill512.t2": 1.5,
    "cpu.batch8.t1": 1.5,
    "cpu.batch8.t2": 1.5,
}


class FakeLLM:
    """Prompts take `prefill_s` each, one after the other; then all sequences decode at `step_s` per token."""

    def __init__(self, prefill_s: float, step_s: float) -> None:
        self.prefill_s, self.step_s, self.core = prefill_s, step_s, object()
        self.asked: list[tuple[list[int], object]] = []

    def generate(self, *, prompt_token_ids, sampling_params, use_tqdm):
        self.asked.append(([len(prompt) for prompt in prompt_token_ids], sampling_params))
        last = 100.0 + self.prefill_s * len(prompt_token_ids)
        end = last + self.step_s * (sampling_params.max_tokens - 1)
        firsts = [100.0 + self.prefill_s * (number + 1) for number in range(len(prompt_token_ids))]
        return [SimpleNamespace(metrics=RequestMetrics(100.0, first, end)) for first in firsts]


class FakePeer:
    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.asked: list[tuple] = []

    def decode(self, *what):
        self.asked.append(("decode", *what))
        return self.rate

    def prefill(self, *what):
        self.asked.append(("prefill", *what))
        return self.rate

    def batch(self, *what):
        self.asked.append(("batch", *what))
        return self.rate

    def complete(self, *what):
        self.asked.append(("complete", *what))
        return SimpleNamespace(tok_s=self.rate)


def rows() -> dict[str, cpu_rows.Row]:
    return {row.id: row for threads in (1, 2) for row in cpu_rows.rows(threads)}


def test_ids_and_targets():
    assert {name: row.target for name, row in rows().items()} == TARGETS


@pytest.mark.parametrize("seed, sequences, tokens, prompt", [(1, 1, 129, 16), (2, 8, 65, 16), (3, 3, 2, 7)])
def test_a_decode_rate_counts_what_follows_the_last_first_token(seed, sequences, tokens, prompt):
    rng = random.Random(seed)
    llm = FakeLLM(rng.uniform(0.1, 9), rng.uniform(0.001, 0.1))
    rate = cpu_rows.decode_rate(llm, tokens, prompt, sequences, temperature=0.8, top_k=40)
    assert rate == pytest.approx(sequences / llm.step_s)
    ((lengths, params),) = llm.asked
    assert lengths == [prompt] * sequences
    assert (params.temperature, params.top_k, params.max_tokens, params.ignore_eos) == (0.8, 40, tokens, True)


@pytest.mark.parametrize("tokens", [512, 17])
def test_a_prefill_rate_ends_with_the_first_token(tokens):
    llm = FakeLLM(0.25, 1e9)
    assert cpu_rows.prefill_rate(llm, tokens) == pytest.approx(tokens / 0.25)
    assert [params.temperature for _, params in llm.asked] == [0]


@pytest.mark.parametrize("name", sorted(TARGETS))
def test_both_sides_of_a_row_do_the_same_work(name):
    row, llm, peer = rows()[name], FakeLLM(0.5, 0.01), FakePeer(50.0)
    row.ours(llm)
    row.theirs(peer)
    (((*_, length), params),), ((kind, threads, *what),) = llm.asked, peer.asked
    assert threads == row.threads == int(name.split(".t")[1][0])
    if kind == "prefill":
        assert length == 512
    elif kind == "batch":
        assert (what, llm.asked[0][0]) == ([8], [16] * 8)
    elif kind == "decode":
        assert (params.max_tokens - 1, length) == ((32, what[1]) if what else (128, 16))
        assert (params.temperature, what) == (0, [32, 2048] if "d2048" in name else [])
    else:
        tokens, samplers = what
        chain = dict(zip(samplers[::2], samplers[1::2], strict=True))
        assert (tokens, chain.pop("--temp")) == (params.max_tokens, str(params.temperature))
        names = set(chain.pop("--samplers").split(";"))
        assert names == {"temperature", "top_k", "top_p"} if "top" in name else names == {"temperature"}
        assert chain == ({"--top-k": str(params.top_k), "--top-p": str(params.top_p)} if "top" in name else {})


@pytest.mark.parametrize("seed, pairs, threads", [(1, 1, 2), (2, 7, 1), (3, 4, 2)])
def test_shares_are_of_the_bandwidth_right_before_with_as_many_threads(monkeypatch, seed, pairs, threads):
    rng = random.Random(seed)
    ceilings = [rng.uniform(20, 40) for _ in range(pairs + 1)]
    asked: list[int] = []
    monkeypatch.setattr(
        cpu_rows, "measure_read_gbs", lambda threads: (asked.append(threads), ceilings[len(asked) - 1])[1]
    )
    monkeypatch.setattr(cpu_rows, "decode_bytes", lambda core, context: (0.2e9, 0.1e9) if context == 80 else None)
    row = rows()[f"cpu.decode128.t{threads}"]
    record, share = cpu_rows.measure(row, FakeLLM(0.5, 0.01), FakePeer(50.0), pairs)
    assert asked == [threads] * (pairs + 1)
    counted = ceilings[1:]  # the first is the warm-up's
    expected = statistics.median(100 * 0.2 / ceiling for ceiling in counted)
    assert record.bus_share == pytest.approx(expected)
    assert record.weight_share == pytest.approx(expected / 2)
    assert record.ceiling_gb_s == statistics.median(counted)
    assert record.samples["ceiling_gb_s"] == counted
    assert (record.ratio and record.ratio.median, record.met()) == (pytest.approx(2.0), True)
    assert (share.id, share.value, share.bus_share) == (
        f"cpu.bus_share.t{threads}",
        pytest.approx(20),
        record.bus_share,
    )
    assert share.met() is (expected >= 0.78)


@pytest.mark.parametrize(
    "name, shares", [("cpu.decode128.t1.screened", 1), ("cpu.decode128.sampled.t2", 1), ("cpu.prefill512.t1", 0)]
)
def test_other_rows_have_one_record(monkeypatch, name, shares):
    monkeypatch.setattr(cpu_rows, "measure_read_gbs", lambda threads: 30.0)
    monkeypatch.setattr(cpu_rows, "decode_bytes", lambda core, context: (0.2e9, 0.1e9))
    records: list[Record] = cpu_rows.measure(rows()[name], FakeLLM(0.5, 0.01), FakePeer(50.0), 2)
    assert [(record.id, record.bus_share is not None) for record in records] == [(name, bool(shares))]
