"""Which tokens a request gets, and when it ends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest

from tests.engine.test_llm import random_ids, run
from tests.seeds import SEED
from tests.tiny_llama import CONFIG, CONTEXT, VOCAB, write_tiny
from tokenspeed.config.generation import generation_from_gguf
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM

HOT: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12}


def greedy(max_tokens: int = 12, **fields: Any) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=max_tokens, **fields)


def test_a_seed_repeats_and_another_differs(llm: LLM) -> None:
    ids = random_ids(20, 23)
    first, second, other = (run(llm, ids, SamplingParams(seed=seed, **HOT)) for seed in (SEED, SEED, SEED + 1))
    assert first == second != other


def test_without_a_seed_requests_differ(llm: LLM) -> None:
    ids = random_ids(21, 10) * 2
    first, second = run(llm, ids, SamplingParams(**HOT))
    assert first != second


@pytest.mark.parametrize("fields", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 20, "top_p": 0.9}])
def test_sampling_is_the_same_alone_and_in_a_batch(llm: LLM, fields: dict[str, Any]) -> None:
    ids = random_ids(22, 3, 31, 8, 17, 1)
    params = [SamplingParams(seed=SEED + i, **HOT, **fields) for i in range(len(ids))]
    together = run(llm, ids, params)
    assert together == [run(llm, [each], [one])[0] for each, one in zip(ids, params, strict=True)]


@pytest.mark.parametrize("fields", [{"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}])
def test_narrow_sampling_is_greedy(llm: LLM, fields: dict[str, Any]) -> None:
    ids = random_ids(23, 4, 19)
    assert run(llm, ids, SamplingParams(seed=SEED, **(HOT | fields))) == run(llm, ids, greedy())


def test_top_k_keeps_to_the_best(llm: LLM) -> None:
    params = SamplingParams(seed=SEED, temperature=50.0, top_k=3, max_tokens=40, logprobs=3)
    (output,) = llm.generate(random_ids(24, 9)[0], params, use_tqdm=False)
    assert output.outputs[0].logprobs is not None
    ranks = [
        entries[token].rank
        for token, entries in zip(output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True)
    ]
    assert set(ranks) == {1, 2, 3}


def test_the_engine_seed_repeats_requests_without_one(tiny_path: Path) -> None:
    def sample(seed: int) -> list[list[int]]:
        llm = LLM(str(tiny_path), dtype="float32", seed=seed)
        return run(llm, random_ids(25, 6) * 3, SamplingParams(**HOT))

    first = sample(SEED)
    assert first == sample(SEED) != sample(SEED + 1)
    assert len({tuple(tokens) for tokens in first}) == 3


def test_a_stop_id_ends_a_request_and_is_kept(llm: LLM) -> None:
    ids = random_ids(26, 11)
    (tokens,) = run(llm, ids, greedy())
    stop = tokens[-1]
    unused = next(token for token in range(VOCAB) if token not in tokens)
    (output,) = llm.generate(ids, greedy(stop_token_ids=[unused, stop]), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.token_ids == tokens[: tokens.index(stop) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", stop)


def test_max_tokens(llm: LLM) -> None:
    ids = random_ids(27, 11)
    (tokens,) = run(llm, ids, greedy(40))
    for count in (1, 2, 39):
        assert run(llm, ids, greedy(count)) == [tokens[:count]]


@pytest.fixture(scope="module")
def eos(tmp_path_factory: pytest.TempPathFactory, loaded_tiny: LLM) -> tuple[Path, list[int], list[int]]:
    """A model whose generation_config.json lists two eos ids, a prompt, and its greedy tokens without any eos."""
    (ids,) = random_ids(28, 13)
    (tokens,) = run(loaded_tiny, [ids], greedy(20))
    folder = tmp_path_factory.mktemp("eos")
    unused = next(token for token in range(VOCAB) if token not in tokens)
    wanted = {"eos_token_id": [unused, tokens[7]], "temperature": 0.5, "top_k": 9, "max_new_tokens": 20}
    write_tiny(folder, SEED, wanted, eos_token_id=tokens[0])
    return folder, ids, tokens


def test_eos_of_generation_config(eos: tuple[Path, list[int], list[int]]) -> None:
    folder, ids, tokens = eos
    llm = LLM(str(folder), dtype="float32")
    (output,) = llm.generate(ids, greedy(20), use_tqdm=False)
    completion = output.outputs[0]
    assert completion.token_ids == tokens[: tokens.index(tokens[7]) + 1]
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert run(llm, [ids], greedy(20, ignore_eos=True)) == [tokens]


def test_sampling_defaults_of_generation_config(eos: tuple[Path, list[int], list[int]]) -> None:
    folder, ids, _ = eos
    llm = LLM(str(folder), dtype="float32", seed=SEED)
    params = llm.get_default_sampling_params()
    assert params == SamplingParams(temperature=0.5, top_k=9, max_tokens=20)
    (output,) = llm.generate(ids, use_tqdm=False)
    named = LLM(str(folder), dtype="float32", seed=SEED).generate(ids, params, use_tqdm=False)
    assert output.outputs[0].token_ids == named[0].outputs[0].token_ids


def test_eos_of_config_where_generation_config_has_none(tmp_path: Path, eos: tuple[Path, list[int], list[int]]) -> None:
    _, ids, tokens = eos
    llm = LLM(str(write_tiny(tmp_path, SEED, eos_token_id=tokens[0])), dtype="float32")
    assert run(llm, [ids], greedy()) == [tokens[:1]]


def test_defaults_that_are_not_supported_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    LLM(str(write_tiny(tmp_path, SEED, {"typical_p": 0.25, "top_p": 0.5})), dtype="float32")
    assert "typical_p 0.25" in caplog.text
    assert "top_p" not in caplog.text


def test_without_defaults(llm: LLM) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()


def write_gguf(path: Path, eos: int, **sampling: float) -> None:
    """A tiny llama of zeros and ones whose next token is always 0."""
    import numpy as np

    writer = gguf.GGUFWriter(path, "llama")
    width, heads, layers = CONFIG["hidden_size"], CONFIG["num_attention_heads"], CONFIG["num_hidden_layers"]
    kv, inner = width // heads * CONFIG["num_key_value_heads"], CONFIG["intermediate_size"]
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(CONFIG["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCAB)
    writer.add_eos_token_id(eos)
    writer.add_eot_token_id(VOCAB - 1)
    for name, value in sampling.items():
        writer.add_float32(f"general.sampling.{name}", value)
    for i in range(layers):
        shapes = {"attn_q": (width, width), "attn_k": (kv, width), "attn_v": (kv, width), "attn_output": (width, width)}
        shapes |= {"ffn_gate": (inner, width), "ffn_up": (inner, width), "ffn_down": (width, inner)}
        for name, shape in shapes.items():
            writer.add_tensor(f"blk.{i}.{name}.weight", np.zeros(shape, dtype=np.float32))
        for name in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{i}.{name}.weight", np.ones(width, dtype=np.float32))
    writer.add_tensor("token_embd.weight", np.ones((VOCAB, width), dtype=np.float32))
    head = np.zeros((VOCAB, width), dtype=np.float32)
    head[0] = 1
    writer.add_tensor("output.weight", head)
    writer.add_tensor("output_norm.weight", np.ones(width, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("eos_id, count", [(0, 1), (5, 16)])
def test_eos_and_defaults_of_gguf(tmp_path: Path, eos_id: int, count: int) -> None:
    write_gguf(tmp_path / "tiny.gguf", eos_id, temp=0.25, top_p=0.75)
    llm = LLM(str(tmp_path / "tiny.gguf"), dtype="float32", seed=SEED)
    assert llm.generation.eos_token_ids == (eos_id, VOCAB - 1)
    assert llm.get_default_sampling_params() == SamplingParams(temperature=0.25, top_p=0.75)
    (output,) = llm.generate([3, 1, 4], use_tqdm=False)
    assert output.outputs[0].token_ids == [0] * count
    assert output.outputs[0].finish_reason == ("stop" if eos_id == 0 else "length")


def test_gguf_defaults_of_penalty_and_min_p() -> None:
    found = generation_from_gguf({"general.sampling.penalty_repeat": 1.1, "general.sampling.min_p": 0.125})
    assert found.sampling == {"repetition_penalty": 1.1, "min_p": 0.125}
