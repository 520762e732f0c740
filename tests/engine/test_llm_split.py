"""A model in shards gives what the whole file gives, whichever shard is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity_tools import CASES, make_gguf, random_prompt
from tests.seeds import SEED
from tokenspeed.contracts.errors import FormatError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM


def completion(model: Path, **settings: Any) -> list[dict[int, float]]:
    llm = LLM(str(model), kv_cache_memory_bytes=1 << 22, **settings)
    params = SamplingParams(temperature=0, max_tokens=5, logprobs=9, ignore_eos=True)
    (output,) = llm.generate(prompt_token_ids=random_prompt(19, SEED), sampling_params=params, use_tqdm=False)
    llm.close()
    assert output.outputs[0].logprobs is not None
    return [{token: each.logprob for token, each in entry.items()} for entry in output.outputs[0].logprobs]


@pytest.mark.parametrize("name", ["llama-llama3", "gemma3"])
def test_shards(tmp_path: Path, name: str) -> None:
    (tmp_path / "shards").mkdir()
    whole = make_gguf(CASES[name], "Q8_0", tmp_path / "whole.gguf").path
    first = make_gguf(CASES[name], "Q8_0", tmp_path / "shards" / "m.gguf", split_max_tensors=7).path
    shards = sorted(first.parent.iterdir())
    assert len(shards) > 2
    expected = completion(whole)
    assert len(expected) == 5
    for given in (first, shards[-1], first.parent):
        assert completion(given) == expected
    assert completion(shards[1], packed_cache=str(tmp_path / "copies")) == expected
    assert completion(shards[0], packed_cache=str(tmp_path / "copies")) == expected
    assert len(list((tmp_path / "copies").iterdir())) == 1
    shards[1].unlink()
    with pytest.raises(FormatError, match=shards[1].name):
        completion(first)
