"""`tokenspeed bench perplexity`: pieces, scores and the error bar as llama-perplexity has them."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from tests.seeds import SEED
from tokenspeed.bench.perplexity import measure, perplexity_of, pieces_of
from tokenspeed.cli.main import main
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM

WORDS = ("the", "of", "and", "a", "to", "in", "it", "is", "was", "that", "he", "for", "on", "are", "with", "as")


@pytest.fixture(scope="module")
def text() -> str:
    return " ".join(random.Random(SEED).choices(WORDS, k=230))


@pytest.fixture(scope="module")
def llm(demo_path: Path) -> LLM:
    return LLM(str(demo_path), max_model_len=65, kv_cache_memory_bytes=64 << 20)


def test_pieces_begin_with_bos_in_place_of_their_first_token(llm: LLM, text: str) -> None:
    tokenizer = llm.get_tokenizer()
    ids = tokenizer.encode(text)
    bos = ids[0]
    assert bos == tokenizer.bos_token_id
    pieces = pieces_of(tokenizer, text, 50)
    assert len(pieces) == len(ids) // 50 > 2
    for at, piece in enumerate(pieces):
        assert piece == [bos, *ids[at * 50 + 1 : (at + 1) * 50]]
    assert pieces_of(tokenizer, text, 50, most=2) == pieces[:2]


def test_the_second_half_is_scored(llm: LLM, text: str) -> None:
    """By log-probabilities of drawn tokens, one by one, in place of those of a prompt."""
    context = 17
    (found,) = measure(llm, text, context, most=2)
    losses = []
    for piece in pieces_of(llm.get_tokenizer(), text, context, most=2):
        for at in range(context // 2 + 1, context):
            params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0, allowed_token_ids=[piece[at]])
            (output,) = llm.generate(prompt_token_ids=[piece[:at]], sampling_params=params, use_tqdm=False)
            told = output.outputs[0].logprobs
            assert told is not None
            losses.append(-told[0][piece[at]].logprob)
    assert found.tokens == len(losses) == 2 * (context - 1 - context // 2)
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-2)


def test_the_error_bar() -> None:
    found = perplexity_of([1.0, 2.0, 3.0, 6.0], 1, 8)
    assert found.value == pytest.approx(math.exp(3))
    assert found.error == pytest.approx(math.exp(3) * math.sqrt(3.5 / 3))


def test_what_cannot_be_measured(llm: LLM, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = llm.get_tokenizer()
    with pytest.raises(ConfigError, match="at least 128 are needed for pieces of 64"):
        pieces_of(tokenizer, "too short", 64)
    with pytest.raises(ConfigError, match="--ctx-size must be at least 4, got 3"):
        pieces_of(tokenizer, "too short", 3)
    (tmp_path / "text").write_text("too short")
    assert main(["bench", "perplexity", str(tmp_path / "text"), "--chunks", "0"]) == 1
    assert "--chunks must be at least 1, got 0" in capsys.readouterr().err


def test_the_command(demo_path: Path, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text(text)
    command = ["bench", "perplexity", str(tmp_path / "text"), "--ctx-size", "32", "--chunks", "3", "--json"]
    assert main([*command, "--model", str(demo_path)]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["pieces"], found["tokens"], found["context"]) == (3, 3 * 15, 32)
    assert found["value"] > 1
