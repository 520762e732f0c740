"""Packed weights on disk: the same logits, no reading of the source, and whatever is wrong is written anew."""

from __future__ import annotations

import errno
import logging
import os
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.parity_tools import CASES, VOCAB, make_gguf, random_prompt
from tests.seeds import SEED
from tests.tiny_llama import write_tiny
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.runner import packed_copy

ROOT = Path(__file__).parents[2]
Logprobs = list[dict[int, float]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama of three formats, whose Q and K rows are interleaved in the file."""
    return make_gguf(CASES["llama"].with_k_widths(), "K", tmp_path_factory.mktemp("source") / "model.gguf").path


def scores(model: Path, folder: Path | None, **settings: Any) -> Logprobs:
    """Log-probabilities of the whole vocabulary, all bits of them, at some positions."""
    llm = LLM(str(model), packed_cache=folder, kv_cache_memory_bytes=1 << 22, **settings)
    assert llm.core.backend.name == "cpu"
    params = SamplingParams(temperature=0, max_tokens=4, logprobs=20, prompt_logprobs=20, ignore_eos=True)
    (output,) = llm.generate(prompt_token_ids=random_prompt(23, SEED), sampling_params=params, use_tqdm=False)
    llm.close()
    assert output.prompt_logprobs is not None
    assert output.outputs[0].logprobs is not None
    entries = [each for each in (*output.prompt_logprobs, *output.outputs[0].logprobs) if each is not None]
    return [{token: found.logprob for token, found in entry.items()} for entry in entries]


def only_file(folder: Path) -> Path:
    (path,) = folder.iterdir()
    assert path.suffix == ".packed"
    return path


def test_same_bits(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = tmp_path / "made" / "on the way"
    expected = scores(source, None)
    assert len(expected) == 26
    assert max(len(entry) for entry in expected) >= 20 < VOCAB
    assert scores(source, folder) == expected
    copy = only_file(folder)
    written = copy.stat().st_mtime_ns
    assert copy.name.endswith("-2.packed")
    steps: list[tuple[int, int]] = []
    assert scores(source, folder, progress=lambda done, total: steps.append((done, total))) == expected
    assert copy.stat().st_mtime_ns == written
    assert steps == sorted(steps)
    assert steps[-1][0] == steps[-1][1] > 100_000
    assert not caplog.records


@pytest.mark.parametrize("name, fmt", [pytest.param("mixtral", "K", marks=pytest.mark.slow), ("gpt_oss", "Q8_0")])
def test_same_bits_of_experts(name: str, fmt: str, tmp_path: Path) -> None:
    case = CASES[name].with_k_widths() if fmt == "K" else CASES[name]
    model = make_gguf(case, fmt, tmp_path / "model.gguf").path
    expected = scores(model, None)
    for _ in range(2):
        assert scores(model, tmp_path / "copies") == expected
    only_file(tmp_path / "copies")


def test_the_copy_is_really_used(source: Path, tmp_path: Path) -> None:
    """A source that is scrambled behind its times and its digest changes nothing."""
    model = tmp_path / "model.gguf"
    model.write_bytes(source.read_bytes())
    expected = scores(model, tmp_path / "copies")
    status, raw = model.stat(), bytearray(model.read_bytes())
    raw[-20_000:-10_000] = bytes(10_000)
    model.write_bytes(raw)
    assert scores(model, tmp_path / "copies") != expected, "a changed file must not be taken for the old one"
    model.write_bytes(source.read_bytes())
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scores(model, tmp_path / "copies") == expected
    model.write_bytes(raw)
    os.utime(model, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scores(model, tmp_path / "copies") == expected


def flip(at: Callable[[int], int]) -> Callable[[bytearray], bytearray]:
    def damage(raw: bytearray) -> bytearray:
        raw[at(len(raw))] ^= 0x10
        return raw

    return damage


def swap_chunks(raw: bytearray) -> bytearray:
    """Two runs of 64-bit numbers of one chunk, not equal, would pass a plain sum: two chunks must not."""
    third = len(raw) // 3 // 4096 * 4096
    raw[third : third + 4096], raw[2 * third : 2 * third + 4096] = (
        raw[2 * third : 2 * third + 4096],
        raw[third : third + 4096],
    )
    return raw


DAMAGE: dict[str, Callable[[bytearray], bytearray]] = {
    "empty": lambda raw: bytearray(),
    "cut in the start": lambda raw: raw[:10],
    "cut in the header": lambda raw: raw[:60],
    "cut in the middle": lambda raw: raw[: len(raw) // 2],
    "cut at the end": lambda raw: raw[:-1],
    "magic": flip(lambda size: 0),
    "byte order": lambda raw: raw[:8] + raw[8:12][::-1] + raw[12:],
    "header length": lambda raw: raw[:12] + struct.pack("=I", 2**31) + raw[16:],
    "header": flip(lambda size: 17),
    "first weights": flip(lambda size: 4096 + 3),
    "middle": flip(lambda size: size // 2),
    "last byte": flip(lambda size: size - 1),
    "zeros": lambda raw: raw[: len(raw) // 2] + bytes(len(raw) - len(raw) // 2),
    "parts changed places": swap_chunks,
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_copies_are_written_anew(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr(packed_copy, "CHUNK", 8192)
    expected = scores(source, tmp_path)
    copy = only_file(tmp_path)
    good = copy.read_bytes()
    copy.write_bytes(DAMAGE[case](bytearray(good)))
    assert copy.read_bytes() != good
    with caplog.at_level(logging.WARNING):
        assert scores(source, tmp_path) == expected
    (record,) = caplog.records
    assert str(copy) in record.getMessage()
    assert "packing anew" in record.getMessage()
    assert only_file(tmp_path).read_bytes() == good
    caplog.clear()
    assert scores(source, tmp_path) == expected
    assert not caplog.records


def test_other_models_and_layouts_are_not_taken(source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A copy under another's name; and one of a model whose rows would be packed in another order."""
    other = make_gguf(CASES["qwen3"], "Q8_0", tmp_path / "other.gguf").path
    folder = tmp_path / "copies"
    expected = scores(source, folder)
    copy = only_file(folder)
    scores(other, folder)
    (second,) = set(folder.iterdir()) - {copy}
    raw = second.read_bytes()
    copy.write_bytes(raw)
    assert scores(source, folder) == expected
    assert [record.getMessage().count("another model or layout") for record in caplog.records] == [1]
    assert copy.read_bytes() != raw


def not_a_folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(b"")
    return tmp_path / "file"


@pytest.mark.parametrize(
    "place", [not_a_folder, lambda tmp_path: not_a_folder(tmp_path) / "below", lambda tmp_path: Path("/proc/nothing")]
)
def test_a_folder_that_cannot_be_written(source: Path, tmp_path: Path, place: Callable[[Path], Path]) -> None:
    folder = place(tmp_path)
    with pytest.raises(ConfigError, match=rf"--packed-cache {folder}: cannot be written \(.+\)$"):
        scores(source, folder)


@pytest.mark.parametrize("calls", [0, 1, 5])
def test_a_disk_that_is_full(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, calls: int) -> None:
    real, left = os.pwrite, [calls]

    def pwrite(*arguments: Any) -> int:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", pwrite)
    with pytest.raises(ConfigError, match=r"cannot be written \(No space left on device\)"):
        scores(source, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_short_reads_and_writes(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: write(file, data[:5000], at))
    expected = scores(source, tmp_path)
    monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][:3333]], at))
    assert scores(source, tmp_path) == expected


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"dtype": "float32"}, "--packed-cache is for the CPU's fast backend"),
        ({"load_format": "dummy", "model": "gemma-3-270m"}, "--packed-cache has no use with --load-format dummy"),
    ],
)
def test_settings_that_have_no_use_for_it(source: Path, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LLM(**{"model": str(source), "packed_cache": str(tmp_path)} | settings)


def test_a_model_of_safetensors(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    write_tiny(model, SEED, num_attention_heads=2, num_key_value_heads=1)
    (tmp_path / "copies").mkdir()
    llm = [LLM(str(model), packed_cache=tmp_path / "copies", seed=0) for _ in range(2)]
    params = SamplingParams(temperature=0, max_tokens=9, logprobs=3, ignore_eos=True)
    made = [each.generate([5, 6, 7], params, use_tqdm=False)[0].outputs[0].logprobs for each in llm]
    assert made[0] == made[1]
    only_file(tmp_path / "copies")


CHILD = """
import sys
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
print("ready", flush=True)
sys.stdin.readline()
for _ in range(3):
    llm = LLM(sys.argv[1], packed_cache=sys.argv[2], threads=1, kv_cache_memory_bytes=1 << 22)
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=1, ignore_eos=True)
    (output,) = llm.generate([1, 2, 3, 4], params, use_tqdm=False)
    print([[each.logprob for each in entry.values()] for entry in output.outputs[0].logprobs])
"""


def test_two_processes_at_once(source: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", CHILD, str(source), str(tmp_path)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    children = [subprocess.Popen(command, cwd=ROOT, text=True, **pipes) for _ in range(2)]
    for child in children:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    outs = []
    for child in children:
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err
        assert err == ""
        outs += out.splitlines()
    assert len(outs) == 6
    assert len(set(outs)) == 1
    only_file(tmp_path)
