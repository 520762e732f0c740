"""The whole house: `tokenspeed serve` with a tiny random model, and with the demo model."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from tests.seeds import SEED
from tests.server.server_process import GUARD_S, ServerProcess, started
from tests.tiny_llama import CONTEXT, write_tiny

PROMPT = "The three primary colors are"
TALK: Any = [{"role": "user", "content": "Name a color."}]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    folder = write_tiny(tmp_path_factory.mktemp("served"), SEED)
    flags = [str(folder), "--dtype", "float32", "--served-model-name", "tiny", "--block-size", "4"]
    with started("tokenspeed.cli.main", ["serve", "--port", "0", *flags]) as server:
        server.wait_until_ready()
        yield server
        assert server.terminate() == 0, server.log


def ids(server: ServerProcess, **fields: Any) -> list[int]:
    body = server.post("/v1/completions", **({"max_tokens": 12, "return_token_ids": True} | fields)).json()
    return body["choices"][0]["token_ids"]


def gauge(server: ServerProcess, name: str) -> float:
    (line,) = (line for line in server.get("/metrics").text.splitlines() if line.startswith(f"tokenspeed:{name}{{"))
    return float(line.split()[-1])


def test_tokens_are_those_of_the_library(tiny: ServerProcess, tmp_path: Path) -> None:
    from tokenspeed.contracts.sampling import SamplingParams
    from tokenspeed.engine.llm import LLM

    llm = LLM(str(write_tiny(tmp_path, SEED)), dtype="float32", block_size=4)
    prompts = [[1, 2, 3], [50, 40, 30, 20, 10]]
    for settings in ({"temperature": 0.0}, {"seed": 5}, {"seed": 6, "top_k": 9, "repetition_penalty": 1.3}):
        params = SamplingParams(max_tokens=12, **settings)
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        assert [ids(tiny, prompt=prompt, **settings) for prompt in prompts] == [o.outputs[0].token_ids for o in outputs]
    llm.close()


def test_a_prompt_seen_before_is_cached(tiny: ServerProcess) -> None:
    prompt = list(range(60, 90))
    usages = [
        tiny.post("/v1/completions", prompt=prompt, max_tokens=1, cache_salt=salt).json()["usage"]
        for salt in ("pepper", "pepper", "salt")
    ]
    assert [usage["prompt_tokens_details"]["cached_tokens"] for usage in usages] == [0, 28, 0]


def test_the_model_is_named_and_its_length_kept(tiny: ServerProcess) -> None:
    (listed,) = tiny.get("/v1/models").json()["data"]
    assert (listed["id"], listed["max_model_len"]) == ("tiny", CONTEXT)
    response = tiny.post("/v1/completions", prompt=[1] * CONTEXT)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "context_length_exceeded")
    body = tiny.post("/v1/completions", prompt=[1] * (CONTEXT - 3), max_tokens=50, ignore_eos=True).json()
    assert body["usage"]["total_tokens"] == CONTEXT
    assert "token ids" in tiny.post("/v1/completions", prompt="text").json()["error"]["message"]
    assert "token ids" in tiny.post("/v1/chat/completions", messages=TALK).json()["error"]["message"]
    assert "97" in tiny.post("/v1/completions", prompt=[97]).json()["error"]["message"]


def test_samples_and_logprobs(tiny: ServerProcess) -> None:
    fields = {"prompt": [3, 1, 4], "n": 3, "max_tokens": 9, "seed": 1, "logprobs": 2, "return_token_ids": True}
    body = tiny.post("/v1/completions", **fields).json()
    samples = [choice["token_ids"] for choice in body["choices"]]
    assert len({tuple(sample) for sample in samples}) > 1
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == sum(map(len, samples))
    for choice in body["choices"]:
        found = choice["logprobs"]
        assert len(found["token_logprobs"]) == len(choice["token_ids"])
        assert all(logprob < 0 for logprob in found["token_logprobs"])
    assert tiny.post("/v1/completions", **fields).json()["choices"] == body["choices"]


def test_timings_of_a_real_engine(tiny: ServerProcess) -> None:
    fields = {"prompt": [5, 3, 5], "max_tokens": 9, "ignore_eos": True}
    timings = tiny.post("/v1/completions", **fields).json()["timings"]
    assert timings["queue_ms"] >= 0
    assert timings["prefill_ms"] > 0
    assert timings["ttft_ms"] == pytest.approx(timings["queue_ms"] + timings["prefill_ms"])
    assert timings["tpot_ms"] > 0
    assert timings["fallback_ops"] == []
    share = timings["share_of_floor"]  # null where this machine's bandwidth was never measured
    assert share is None or share > 0


@pytest.mark.parametrize(
    "fields, param",
    [
        ({"bad_words": ["text"]}, "bad_words"),
        ({"allowed_token_ids": [3], "stop_token_ids": [3], "min_tokens": 2}, "allowed_token_ids"),
        ({"temperature": 1e39}, "temperature"),
        ({"temperature": 1e39, "logprobs": 1}, "temperature"),
        ({"repetition_penalty": 1e39}, "repetition_penalty"),
        ({"priority": 10**30}, "priority"),
        ({"priority": -(2**63)}, "priority"),
    ],
)
def test_what_would_end_an_engine_is_refused(tiny: ServerProcess, fields: dict[str, Any], param: str) -> None:
    (engine,) = tiny.children()
    response = tiny.post("/v1/completions", prompt=[1, 2], max_tokens=5, **fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param), response.text
    assert len(ids(tiny, prompt=[1, 2], max_tokens=3, ignore_eos=True)) == 3
    assert tiny.children() == [engine]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 1e6},
        {"temperature": 1e6, "top_k": 1},
        {"repetition_penalty": 1e6, "temperature": 1e6},
        {"repetition_penalty": 1e-6, "logprobs": 2},
        {"top_p": 5e-324},
        {"min_p": 1e-300, "seed": 2**64 - 1},
        {"logit_bias": {"5": -1e308, "6": 1e308}},
        {"priority": -(2**31)},
    ],
)
def test_extreme_values_choose_a_token(tiny: ServerProcess, fields: dict[str, Any]) -> None:
    (engine,) = tiny.children()
    assert len(ids(tiny, prompt=[1, 2], max_tokens=5, ignore_eos=True, **fields)) == 5
    assert tiny.children() == [engine]


def test_one_client_leaves_another_stays(tiny: ServerProcess) -> None:
    body = {"prompt": [7, 8], "max_tokens": CONTEXT - 2, "ignore_eos": True, "stream": True, "return_token_ids": True}
    body |= {"temperature": 0, "stream_options": {"include_usage": True}}
    alone = ids(tiny, prompt=[7, 8], max_tokens=CONTEXT - 2, ignore_eos=True, temperature=0)

    async def read(client: httpx2.AsyncClient, leave_after: int | None) -> list[Any]:
        events: list[Any] = []
        async with client.stream("POST", f"{tiny.url}/v1/completions", json=body, timeout=GUARD_S) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    events.append(json.loads(line[6:]))
                if len(events) == leave_after:
                    break
        return events

    async def both() -> list[Any]:
        async with httpx2.AsyncClient() as client:
            return (await asyncio.gather(read(client, 3), read(client, None)))[1]

    *events, last = asyncio.run(both())
    assert [token for event in events for token in event["choices"][0]["token_ids"]] == alone
    assert last["usage"]["completion_tokens"] == len(alone)
    while gauge(tiny, "num_requests_running"):
        pass
    assert gauge(tiny, "kv_cache_usage_perc") == 0
    assert gauge(tiny, "step_time_seconds_count") >= CONTEXT - 2
    assert 0 < gauge(tiny, "device_idle_seconds_total") < gauge(tiny, "request_inference_time_seconds_sum")
    assert gauge(tiny, "request_queue_time_seconds_count") > 0


def test_prompt_logprobs_by_echo(demo_server: ServerProcess) -> None:
    fields = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0}
    (choice,) = demo_server.post("/v1/completions", **fields).json()["choices"]
    assert choice["text"] == PROMPT
    found = choice["logprobs"]
    assert "".join(found["tokens"]) == f"<bos>{PROMPT}"
    assert found["token_logprobs"][0] is None
    assert all(logprob <= 0 for logprob in found["token_logprobs"][1:])
    asked = {"prompt": PROMPT, "prompt_logprobs": 1, "max_tokens": 1, "return_token_ids": True}
    (choice,) = demo_server.post("/v1/completions", **asked).json()["choices"]
    own = zip(choice["prompt_token_ids"], choice["prompt_logprobs"], strict=True)
    assert [entries and entries[str(token)]["logprob"] for token, entries in own] == pytest.approx(
        found["token_logprobs"]
    )
    spelled = demo_server.post("/tokenize", prompt=PROMPT, return_token_strs=True).json()
    assert (spelled["tokens"], spelled["token_strs"]) == (choice["prompt_token_ids"], found["tokens"])
    assert demo_server.post("/detokenize", tokens=spelled["tokens"]).json() == {"prompt": f"<bos>{PROMPT}"}


def test_killing_the_engine_fails_its_requests(demo_server: ServerProcess) -> None:
    """And another one serves the next."""
    (engine,) = demo_server.children()
    body = {"prompt": PROMPT, "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx2.stream("POST", f"{demo_server.url}/v1/completions", json=body, timeout=GUARD_S) as response:
        lines = (line for line in response.iter_lines() if line)
        next(lines)
        os.kill(engine, signal.SIGKILL)
        *_, error, done = lines
    assert "SIGKILL" in json.loads(error.removeprefix("data: "))["error"]["message"]
    assert done == "data: [DONE]"
    assert demo_server.get("/health").status_code == 503
    demo_server.wait_until_ready()
    assert (
        "red"
        in demo_server.post("/v1/completions", prompt=PROMPT, max_tokens=8, temperature=0).json()["choices"][0]["text"]
    )
    assert demo_server.children() != [engine]
