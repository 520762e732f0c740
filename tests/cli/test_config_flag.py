"""Where a setting comes from: command line, file, environment, default; in `serve`, `generate` and `chat`."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from tests.cli.conftest import Cli
from tokenspeed.cli.flags import engine_settings, given_settings
from tokenspeed.cli.main import main, parser
from tokenspeed.cli.serve import serve_config
from tokenspeed.config.serving import AccessConfig, OperationsConfig, ServeConfig
from tokenspeed.config.settings import settings_of

TEXT = """
model: from/file
served-model-name: [large, small]
max_num_seqs: 3
enable-prefix-caching: false
cors-origin: "*"
max-n: 7
drain-timeout: 5
admin-key: "007"
"""


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TOKENSPEED_API_KEY", "TOKENSPEED_ADMIN_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "serve.yaml").write_text(TEXT)
    return tmp_path / "serve.yaml"


def serve(*arguments: object) -> ServeConfig:
    return serve_config(parser().parse_args(["serve", *map(str, arguments)]))


def test_nothing_given_is_all_defaults() -> None:
    assert serve() == ServeConfig()


def test_a_file_alone(file: Path) -> None:
    config = serve("--config", file)
    assert (config.engine.model, config.engine.max_num_seqs, config.engine.enable_prefix_caching) == (
        "from/file",
        3,
        False,
    )
    assert (config.server.served_model_name, config.server.drain_timeout) == (("large", "small"), 5)
    assert (config.access.cors_origin, config.limits.max_n, config.operations.admin_key) == (("*",), 7, "007")
    assert config.engine.block_size == ServeConfig().engine.block_size


def test_the_command_line_comes_first(file: Path) -> None:
    config = serve("there", "--config", file, "--max-num-seqs", 9, "--enable-prefix-caching", "--max-n", 8)
    assert (config.engine.model, config.engine.max_num_seqs, config.limits.max_n) == ("there", 9, 8)
    assert config.engine.enable_prefix_caching
    assert serve("--model", "there", "--config", file).engine.model == "there"
    config = serve("--served-model-name", "one", "--cors-origin", "https://a.example.org", "--config", file)
    assert (config.server.served_model_name, config.access.cors_origin) == (("one",), ("https://a.example.org",))
    assert serve("--shutdown-timeout", 6, "--config", file).server.drain_timeout == 6


@pytest.mark.parametrize("settings, name", [(AccessConfig, "api_key"), (OperationsConfig, "admin_key")])
def test_the_environment_comes_last(settings: type, name: str, tmp_path: Path) -> None:
    variables = {"TOKENSPEED_API_KEY": "env", "TOKENSPEED_ADMIN_KEY": "env"}
    (tmp_path / "keys.yaml").write_text(f"{name}: file")

    def given(**options: object) -> object:
        found = given_settings(argparse.Namespace(**options), settings_of(settings), variables)[name]
        return found[0] if isinstance(found, tuple) else found

    file = str(tmp_path / "keys.yaml")
    line = ["line"] if name == "api_key" else "line"
    assert (given(), given(config=file), given(config=file, **{name: line})) == ("env", "file", "line")


@pytest.mark.parametrize("name", ["TOKENSPEED_API_KEY", "TOKENSPEED_ADMIN_KEY"])
def test_an_empty_key_of_the_environment_opens_nothing(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(name, "")
    assert main(["serve", "--port", "0"]) == 1
    assert f"{name.removeprefix('TOKENSPEED_').lower().replace('_', '-')} must" in capsys.readouterr().err


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("port: 70000", "line 1: port must be from 0 to 65535, got 70000"),
        ("max-num-sekvs: 3", "unknown key 'max-num-sekvs' (is it max-num-seqs?)"),
        ("config: other.yaml", "unknown key 'config'"),
        ("trust-remote-code: true", "--trust-remote-code is refused"),
        ("root-path: llm", "--root-path must begin with /"),
        ("served-model-name: ''", "--served-model-name must not be empty"),
        ("log-prompts: true\nenable-log-requests: false", "--log-prompts contradicts --no-enable-log-requests"),
        ("api-key: 123", "api-key must be str, got int: put it in quotes"),
        ("dtype: int8", "dtype must be one of auto, bfloat16"),
    ],
)
def test_one_line_for_what_is_wrong(
    text: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "serve.yaml").write_text(text)
    assert main(["serve", "--config", str(tmp_path / "serve.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenspeed: error: ")
    assert complaint in line


@pytest.mark.parametrize("command", [["generate", "x"], ["chat", "x"]])
def test_engine_flags_of_other_commands(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "engine.yaml").write_text("model: there\nmax-num-seqs: 3\n")
    options = parser().parse_args([*command, "--config", str(tmp_path / "engine.yaml"), "--max-num-seqs", "4"])
    assert engine_settings(options) == {"model": "there", "max_num_seqs": 4}


def test_generate_with_a_file(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "engine.yaml").write_text("max-model-len: 4\n")
    ran = cli("generate", "--config", str(tmp_path / "engine.yaml"), "one two three four five")
    assert (ran.status, ran.out) == (1, "")
    assert "max_model_len 4" in ran.err
    for key in ("port: 1", "chat-template: plain"):
        (tmp_path / "engine.yaml").write_text(key)
        ran = cli("generate", "--config", str(tmp_path / "engine.yaml"), "x")
        assert ran.status == 1
        assert f"unknown key '{key.partition(':')[0]}'" in ran.err
