"""An fp8 KV cache with the scales of a checkpoint, from its files to its logits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.seeds import SEED
from tests.tiny_llama import CONFIG, VOCAB, edit_tensors, write_tiny
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError, WeightError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine import core
from tokenspeed.engine.llm import LLM
from tokenspeed.runner import build

LARGE = 4096.0
"""Values and keys are so many times as large as usual; e4m3 ends at 448. A power of two: nothing is rounded."""
DTYPES = ("bfloat16", "float32")


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A model whose keys and values do not fit e4m3, which its queries and outputs make up for."""
    write_tiny(tmp_path, SEED)
    tensors = load_file(tmp_path / "model.safetensors")
    factors = {"q_proj": 1 / LARGE, "k_proj": LARGE, "v_proj": LARGE, "o_proj": 1 / LARGE}
    changed = {name: factors[part] * each for name, each in tensors.items() for part in factors if part in name}
    edit_tensors(tmp_path, add=changed)
    return tmp_path


def add_scales(folder: Path, key: float = LARGE, value: float = LARGE) -> None:
    layers = range(CONFIG["num_hidden_layers"])
    given = {"k": key, "v": value}
    names = {f"model.layers.{i}.self_attn.{part}_scale": given[part] for i in layers for part in "kv"}
    edit_tensors(folder, add={name: torch.tensor([scale]) for name, scale in names.items()})


def scores(folder: Path, **settings: Any) -> torch.Tensor:
    """Log-probabilities of a prompt and of tokens after it."""
    prompt = torch.randint(VOCAB, (60,), generator=torch.Generator().manual_seed(SEED)).tolist()
    llm = LLM(str(folder), block_size=16, **settings)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate(prompt, params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    given = zip(prompt[1:], output.prompt_logprobs[1:], strict=True)
    return torch.tensor([entry[token].logprob for token, entry in given if entry is not None])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scales_keep_what_would_be_clipped(tmp_path: Path, large: Path, dtype: str) -> None:
    usual = tmp_path / "usual"
    usual.mkdir()
    write_tiny(usual, SEED)
    expected = scores(usual, dtype=dtype, kv_cache_dtype="fp8")
    assert expected.isfinite().all()
    assert not torch.equal(expected, scores(usual, dtype=dtype))
    clipped = scores(large, dtype=dtype, kv_cache_dtype="fp8")
    assert not torch.equal(clipped, expected)
    exact = scores(large, dtype=dtype)
    add_scales(large)
    assert torch.equal(scores(large, dtype=dtype, kv_cache_dtype="fp8"), expected)
    assert torch.equal(scores(large, dtype=dtype), exact), "scales have no use without fp8"


def test_what_is_said(large: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tokenspeed")

    def said(**settings: Any) -> list[str]:
        caplog.clear()
        LLM(str(large), **settings)
        return [record.getMessage() for record in caplog.records if "scales" in record.getMessage()]

    without = "--kv-cache-dtype fp8: the checkpoint has no scales for it; keys and values are stored as they are"
    assert said() == []
    assert [line.startswith(without) for line in said(kv_cache_dtype="fp8")] == [True]
    assert said(kv_cache_dtype="int8") == []
    assert said(kv_cache_dtype="fp8", load_format="dummy") == []
    add_scales(large)
    assert said(kv_cache_dtype="fp8_e4m3") == []
    assert said() == ["the checkpoint has scales for an fp8 KV cache, which --kv-cache-dtype fp8 asks for"]
    edit_tensors(large, remove=("model.layers.1.self_attn.v_scale",))
    LLM(str(large))
    with pytest.raises(WeightError, match="none for v of layer 1"):
        LLM(str(large), kv_cache_dtype="fp8")


def test_the_root_of_prefix_keys_names_them(large: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "checkpoint_digest", lambda *given: "the same")
    roots: list[bytes] = []
    root = core._root

    def kept(*given: Any) -> bytes:
        roots.append(root(*given))
        return roots[-1]

    monkeypatch.setattr(core, "_root", kept)
    LLM(str(large), kv_cache_dtype="fp8")
    for key, value in ((2.0, 3.0), (3.0, 2.0), (2.0, 3.0)):
        add_scales(large, key, value)
        LLM(str(large), kv_cache_dtype="fp8")
    assert len(set(roots)) == 3
    assert roots[1] == roots[3]


def test_gpus_take_it_where_they_have_e4m3(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.version, "hip", None)
    for capability, fits in (((8, 0), False), ((8, 9), True), ((9, 0), True)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        config = EngineConfig.from_kwargs({"kv_cache_dtype": "fp8"})
        if fits:
            assert build.kv_cache_dtype(config, torch.bfloat16, device) == torch.float8_e4m3fn
        else:
            with pytest.raises(
                ConfigError, match=r"--kv-cache-dtype fp8: this GPU has no e4m3 \(compute capability 8.9"
            ):
                build.kv_cache_dtype(config, torch.bfloat16, device)
