from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tokenspeed.config import hub
from tokenspeed.config.source import ModelSource, resolve_model, resolve_tokenizer
from tokenspeed.contracts.errors import ConfigError, ModelNotFoundError, UnsupportedError


def touch(directory: Path, *names: str) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).write_bytes(b"x")
    return directory


def test_a_gguf_file(tmp_path: Path) -> None:
    path = touch(tmp_path, "m.gguf") / "m.gguf"
    assert resolve_model(str(path)) == ModelSource(path, "gguf", str(path))


def test_a_directory_of_safetensors_wins_over_a_gguf_in_it(tmp_path: Path) -> None:
    touch(tmp_path, "config.json", "model.safetensors", "m.gguf", "pytorch_model.bin")
    assert resolve_model(str(tmp_path)) == ModelSource(tmp_path, "safetensors", str(tmp_path))


def test_a_directory_with_one_gguf(tmp_path: Path) -> None:
    touch(tmp_path, "m.gguf", "README.md", "config.json")
    assert resolve_model(str(tmp_path)) == ModelSource(tmp_path / "m.gguf", "gguf", str(tmp_path))


def test_home_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    touch(tmp_path, "m.gguf")
    assert resolve_model("~/m.gguf").path == tmp_path / "m.gguf"


def test_config_alone_is_enough_where_no_weights_are_needed(tmp_path: Path) -> None:
    touch(tmp_path, "config.json")
    assert resolve_model(str(tmp_path), need_weights=False).format == "safetensors"
    with pytest.raises(ModelNotFoundError, match="no model here"):
        resolve_model(str(tmp_path))


def test_a_directory_with_one_split_gguf(tmp_path: Path) -> None:
    names = [f"m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    touch(tmp_path, *names)
    assert resolve_model(str(tmp_path)).path == tmp_path / names[0]
    assert resolve_model(str(tmp_path / names[2])).path == tmp_path / names[2]
    touch(tmp_path, "n-00001-of-00002.gguf", "n-00002-of-00002.gguf")
    with pytest.raises(ConfigError, match=r"2 \.gguf models.*m-00001-of-00003\.gguf, n-00001-of-00002\.gguf$"):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "names, error, message",
    [
        ([], ModelNotFoundError, "no model here"),
        (["model.safetensors"], ModelNotFoundError, r"no config\.json"),
        (["a.gguf", "b.gguf"], ConfigError, r"2 \.gguf models.*a\.gguf, b\.gguf"),
        (["config.json", "pytorch_model.bin"], UnsupportedError, r"pickle.*pytorch_model\.bin"),
        (["consolidated.00.pth"], UnsupportedError, r"consolidated\.00\.pth.*safetensors"),
    ],
)
def test_directories_that_are_no_model(tmp_path: Path, names: list[str], error: type[Exception], message: str) -> None:
    touch(tmp_path, *names)
    with pytest.raises(error, match=message):
        resolve_model(str(tmp_path))


@pytest.mark.parametrize(
    "name, error, message",
    [
        ("w.pt", UnsupportedError, "pickle"),
        ("w.safetensors", ConfigError, "directory"),
        ("w.txt", UnsupportedError, "not a model file"),
    ],
)
def test_files_that_are_no_model(tmp_path: Path, name: str, error: type[Exception], message: str) -> None:
    touch(tmp_path, name)
    with pytest.raises(error, match=message):
        resolve_model(str(tmp_path / name))


@pytest.mark.parametrize(
    "name",
    ["", "nothing", "/no/such/dir", "./no/such", "a/b/c", "org/missing.gguf", "org/na me", "../x/y", "a/b/../c.gguf"],
)
def test_names_that_are_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no model"):
        resolve_model(name)


def test_a_repository_is_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def snapshot_download(repo: str, *, revision: str | None, allow_patterns: list[str], cache_dir: str | None) -> str:
        calls.append((repo, revision, any("safetensors" in pattern for pattern in allow_patterns)))
        assert not any(pattern in allow_patterns for pattern in ("*", "*.bin", "*.pt", "*.py"))
        return str(touch(tmp_path / "snapshot", "config.json", "model.safetensors"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert resolve_model("org/name-1.0").path == tmp_path / "snapshot"
    assert resolve_model("org/name@refs/pr/1").name == "org/name@refs/pr/1"
    resolve_model("org/name@v2", need_weights=False)
    assert calls == [("org/name-1.0", None, True), ("org/name", "refs/pr/1", True), ("org/name", "v2", False)]


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
def test_a_directory_with_a_tokenizer_alone(tmp_path: Path, file: str) -> None:
    touch(tmp_path, file)
    assert resolve_tokenizer(str(tmp_path)) == ModelSource(tmp_path, "safetensors", str(tmp_path))


def test_tokenizers_beside_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    asked = []

    def snapshot_download(repo: str, **settings: Any) -> str:
        asked.append((repo, settings["revision"], settings["cache_dir"], settings["allow_patterns"]))
        return str(touch(tmp_path / "snapshot", "config.json", *(["tokenizer.json"] if repo == "org/with" else [])))

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    with pytest.raises(ModelNotFoundError, match=r"--tokenizer org/without: no tokenizer there \(looked for tokenizer"):
        resolve_tokenizer("org/without")
    assert resolve_tokenizer("org/with@v3", "/models").path == tmp_path / "snapshot"
    assert [each[:3] for each in asked] == [("org/without", None, None), ("org/with", "v3", "/models")]
    assert not any("safetensors" in pattern for pattern in asked[0][3])
    touch(tmp_path / "both", "m.gguf")
    assert resolve_tokenizer(str(tmp_path / "both")).format == "gguf"


class FakeHub:
    """A repository of given files; downloads those that match, as the hub's own client does."""

    def __init__(self, folder: Path, *files: str) -> None:
        self.folder, self.files = folder, files
        self.revisions: list[str | None] = []

    def snapshot_download(
        self, repo: str, *, revision: str | None, allow_patterns: list[str], cache_dir: str | None
    ) -> str:
        from huggingface_hub.utils._paths import filter_repo_objects

        self.revisions.append(revision)
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns):
            touch((self.folder / name).parent, Path(name).name)
        return str(self.folder)

    def fetched(self) -> list[str]:
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file())


SHARDS = [f"BF16/m-0000{i}-of-00003.gguf" for i in (1, 2, 3)]


@pytest.mark.parametrize(
    "asked, wanted",
    [
        ("m-Q4_K_M.gguf", ["m-Q4_K_M.gguf"]),
        ("BF16/m-00002-of-00003.gguf", SHARDS),
        ("a [1] b.gguf", None),
        ("m-Q8_0.gguf@v2", ["m-Q8_0.gguf"]),
    ],
)
def test_a_gguf_of_a_repository_comes_with_all_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, wanted: list[str] | None
) -> None:
    hub_files = FakeHub(tmp_path / "snapshot", "m-Q4_K_M.gguf", "m-Q8_0.gguf", "config.json", "m.gguf", *SHARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub_files.snapshot_download)
    name = f"org/name/{asked}"
    if wanted is None:
        with pytest.raises(ModelNotFoundError, match="no model at"):
            resolve_model(name)
        return
    source = resolve_model(name)
    file, _, revision = asked.partition("@")
    assert source == ModelSource(tmp_path / "snapshot" / file, "gguf", name)
    assert hub_files.fetched() == wanted
    assert hub_files.revisions == [revision or None]


@pytest.mark.parametrize(
    "asked, missing", [("x.gguf", r"x\.gguf"), ("BF16/m-00003-of-00003.gguf", r"BF16/m-00002-of-00003\.gguf$")]
)
def test_a_gguf_that_a_repository_lacks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: str, missing: str
) -> None:
    hub_files = FakeHub(tmp_path / "snapshot", "config.json", SHARDS[0], SHARDS[2])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "snapshot").mkdir()
    monkeypatch.setattr("huggingface_hub.snapshot_download", hub_files.snapshot_download)
    with pytest.raises(ModelNotFoundError, match=rf"org/name has no {missing}"):
        resolve_model(f"org/name/{asked}")


def hub_error(name: str) -> Exception:
    from huggingface_hub import errors

    kind: type[Exception] = getattr(errors, name)
    return kind.__new__(kind, "as the hub says it")  # without the response object that their constructors want


@pytest.mark.parametrize(
    "error, message",
    [
        (hub_error("RepositoryNotFoundError"), "no such repository"),
        (hub_error("GatedRepoError"), "access to it must be granted"),
        (hub_error("RevisionNotFoundError"), "at revision v9.*no such revision"),
        (hub_error("LocalEntryNotFoundError"), "no network"),
        (ConnectionError("refused\nby host"), "ConnectionError: refused by host"),
        (OSError(28, "No space left on device"), "No space left"),
    ],
)
def test_what_the_hub_says_becomes_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*_: object, **__: object) -> str:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", fail)
    with pytest.raises(ModelNotFoundError, match=message) as caught:
        resolve_model("org/name@v9")
    assert "\n" not in str(caught.value)
    assert "org/name" in str(caught.value)


def test_without_network_and_cache_there_is_one_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError, match="org-that-is-not/there"):
        hub.fetch_repository("org-that-is-not/there", None, need_weights=True)
