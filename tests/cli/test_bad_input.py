"""Whatever is wrong: one line on stderr that names it, a non-zero exit, no traceback."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import Cli, Ran
from tests.engine.test_llm_sampling import write_gguf
from tests.tiny_llama import CONFIG


def unsaid(ran: Ran, *words: str, status: int = 1) -> list[str]:
    """Of the words, those that the one line of a refusal lacks."""
    assert ran.status == status
    assert ran.out == ""
    (line,) = ran.err.splitlines()
    assert line.startswith("tokenspeed: error: ")
    return [word for word in words if word not in line]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["generate", "--bogus", "x"], ["--bogus"]),
        (["generate", "--max-token", "3", "x"], ["--max-token"]),
        (["generate", "--chat-template", "plain", "x"], ["--chat-template"]),
        (["generate", "--max-tokens", "many", "x"], ["--max-tokens", "many"]),
        (["generate", "--dtype", "int3", "x"], ["--dtype", "int3", "bfloat16"]),
        (["generate", "one", "two"], ["two"]),
        (["bogus"], ["bogus", "generate"]),
        ([], ["COMMAND"]),
        (["sol", "--batch", "x"], ["--batch"]),
    ],
)
def test_wrong_usage(cli: Cli, arguments: list[str], words: list[str]) -> None:
    assert unsaid(cli(*arguments), *words, "--help", status=2) == []


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["x", "--file", "y"], ["--file", "not both"]),
        ([""], ["the prompt is empty"]),
        (["--temperature", "nan", "x"], ["temperature", "nan"]),
        (["--temperature", "-1", "x"], ["temperature", "at least 0"]),
        (["--top-p", "0", "x"], ["top_p"]),
        (["--top-k", "-5", "x"], ["top_k"]),
        (["--max-tokens", "0", "x"], ["max_tokens"]),
        (["--logprobs", "3", "x"], ["--logprobs needs --json"]),
        (["--json", "--logprobs", "1000", "x"], ["logprobs", "64"]),
        (["--stop-token-ids", "-3", "--ignore-eos", "x"], ["stop_token_ids"]),
        (["--stop-token-ids", "262144", "--max-model-len", "64", "x"], ["262144", "0 to 262143"]),
        (["--max-model-len", "1", "x"], ["--max-model-len", "at least 2"]),
        (["--max-model-len", "40000", "x"], ["--max-model-len 40000", "context of 32768"]),
        (["--block-size", "0", "x"], ["--block-size"]),
        (["--revision", "main", "x"], ["--revision needs --model"]),
        (["--device", "cuda", "x"], ["--device cuda"]),
        (["--kv-cache-memory-bytes", "5000", "x"], ["needs", "MiB free", "--kv-cache-memory-bytes"]),
        (["--max-model-len", "4", "one two three four five"], ["max_model_len 4"]),
        (["--model", "/no/such/place", "x"], ["/no/such/place"]),
        (["--model", "org/no-such-model", "x"], ["org/no-such-model", "no network"]),
        (["--file", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["--file", "/"], ["/: cannot be read"]),
    ],
)
def test_generate_refuses(cli: Cli, arguments: list[str], words: list[str]) -> None:
    if "cuda" in arguments:
        import torch

        if torch.cuda.is_available():
            arguments = ["--device", "cpu", "--dtype", "float16", "x"]
            words = ["--dtype float16"]
    assert unsaid(cli("generate", *arguments), *words) == []


def test_prompts_that_are_not_utf8(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes("schön".encode("latin-1"))
    assert unsaid(cli("generate", "--file", str(tmp_path / "latin")), "latin", "not UTF-8", "byte 3") == []
    assert unsaid(cli("generate", stdin=b"ab\xff"), "stdin", "not UTF-8", "byte 2") == []
    assert unsaid(cli("generate", stdin=b"\n"), "the prompt is empty") == []
    assert unsaid(cli("generate", "--max-model-len", "64", "a\udcffb"), "not valid Unicode") == []


def test_a_damaged_demo_model(cli: Cli, demo_path: Path) -> None:
    link = Path(os.environ["XDG_CACHE_HOME"]) / "tokenspeed" / "models" / demo_path.name
    link.unlink()
    link.with_name(link.name + ".verified").unlink()
    with link.open("wb") as file:
        file.truncate(demo_path.stat().st_size)
    ran = cli("generate", "x")
    assert unsaid(ran, "sha256", "a5fd3b62", "delete it") == []


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A directory with a config and an empty checkpoint."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "m" / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return tmp_path / "m"


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("config.json", None, ["no config.json"]),
        ("config.json", b"{not json", ["config.json"]),
        ("config.json", json.dumps(CONFIG | {"model_type": "rwkv99"}).encode(), ["rwkv99", "gemma3_text", "qwen3"]),
        ("model.safetensors", b"\x01", ["model.safetensors", "truncated"]),
        ("model.safetensors", b"\xff" * 64, ["model.safetensors", "header length"]),
    ],
)
@pytest.mark.parametrize("command", [("generate", "x", "--model"), ("sol", "--gpu", "H200"), ("plan", "--gpu", "H200")])
def test_broken_models(
    cli: Cli, model: Path, name: str, content: bytes | None, words: list[str], command: tuple[str, ...]
) -> None:
    if content is None:
        (model / name).unlink()
    else:
        (model / name).write_bytes(content)
    assert unsaid(cli(*command, str(model)), *words) == []


def test_a_checkpoint_without_its_tensors(cli: Cli, model: Path) -> None:
    assert unsaid(cli("generate", "--model", str(model), "x"), "lacks 21 tensors", "model.embed_tokens.weight") == []


def test_broken_gguf(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_gguf(file, 0)
    whole = file.read_bytes()
    for damaged, words in (
        (whole[:-40], ["tiny.gguf", "output_norm.weight", "ends at"]),
        (whole[:30], ["tiny.gguf"]),
        (b"", ["empty"]),
        (whole.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0rwkv9"), ["'rwkv9'", "llama", "gemma3"]),
        (whole.replace(b"blk.1.ffn_up", b"blk.1.ffn_xx"), ["blk.1.ffn_up.weight", "blk.1.ffn_xx.weight"]),
    ):
        file.write_bytes(damaged)
        assert unsaid(cli("generate", "--model", str(file), "x"), *words) == []


def test_a_model_without_a_tokenizer(cli: Cli, tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", 0)
    assert unsaid(cli("generate", "--model", str(tmp_path / "tiny.gguf"), "x"), "no tokenizer") == []


@pytest.mark.parametrize(
    "arguments, words, status",
    [
        pytest.param(
            ["generate", "--kv-cache-memory-bytes", "5000", "x"],
            [b"--kv-cache-memory-bytes"],
            1,
            marks=pytest.mark.slow,
        ),
        (["generate", "--bogus", "x"], [b"--bogus"], 2),
        (["plan", "--gpu", "Z80"], [b"Z80", b"H200"], 1),
    ],
)
def test_in_a_process_of_its_own(
    child: Callable[..., subprocess.Popen[bytes]], arguments: list[str], words: list[bytes], status: int
) -> None:
    process = child(*arguments)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (status, b"")
    (line,) = err.splitlines()
    assert line.startswith(b"tokenspeed: error: ")
    for word in words:
        assert word in line


def test_an_unmeasured_machine(cli: Cli) -> None:
    (Path(os.environ["XDG_CACHE_HOME"]) / "tokenspeed" / "ceilings.json").unlink()
    assert unsaid(cli("sol"), "doctor --measure", "--gpu") == []
