"""Commands and Python of the documentation, run as they stand there but for addresses, a model's path and sizes."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.docs_commands import PYTHON, ROOT, SNIPPETS, Shown, rule_of, shown
from tests.server.server_process import ServerProcess, started

pytestmark = pytest.mark.slow
SHOWN = list({each.text: each for each in shown()}.values())
ADDRESS = "localhost:8000"
PLACEHOLDERS = ("path/to/model.gguf", "path/to/model", "MODEL", "DIR")
"""The demo model stands for each, and a page for FILE."""
SMALLER = {
    "--concurrency": "2",
    "--group-size": "2",
    "--groups": "2",
    "--inject-len": "96",
    "--input-len": "24",
    "--num-conversations": "2",
    "--num-requests": "4",
    "--output-len": "6",
    "--prefix-len": "32",
    "--rate": "8",
    "--settle": "0.2",
    "--suffix-len": "8",
    "--think-time": "0",
    "--time-scale": "0.01",
    "--turn-len": "8",
    "--turns": "2:3",
}
"""What a load has to do here."""
TRACE = '{"timestamp": 0, "input_length": 40, "output_length": 3, "hash_ids": [1]}\n' * 4


def of(how: str) -> list[str]:
    """Commands of that kind."""
    rules = [(each.text, rule_of(each.text)) for each in SHOWN if each.kind != PYTHON]
    return [text for text, rule in rules if rule is not None and rule.how == how]


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree, in which commands may write."""
    target = tmp_path_factory.mktemp("docs") / "tree"
    away = shutil.ignore_patterns(".*", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, target, ignore=away)
    return target


@pytest.fixture(scope="module")
def run(copy: Path, demo_path: Path) -> Callable[[str], str]:
    """run(command) gives what it printed; its cache is its own, but for the demo model."""
    models = copy / "cache" / "tokenspeed" / "models"
    models.mkdir(parents=True)
    for file in (demo_path, demo_path.with_name(demo_path.name + ".verified")):
        (models / file.name).symlink_to(file)
    programs = copy / "programs"
    programs.mkdir()
    for name, words in {"tokenspeed": "-m tokenspeed.cli.main", "python": "", "python3": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {words} "$@"\n')
        (programs / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(copy),
        "XDG_CACHE_HOME": str(copy / "cache"),
        "HF_HUB_OFFLINE": "1",
    }

    def run(command: str) -> str:
        command = _filled(command.replace(".venv/bin/", ""), demo_path)
        done = subprocess.run(
            ["bash", "-ec", command], cwd=copy, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout

    run("tokenspeed doctor --measure")
    return run


def _filled(text: str, demo_path: Path) -> str:
    for name in PLACEHOLDERS:
        text = re.sub(rf"(?<![\w/-]){re.escape(name)}\b", str(demo_path), text)
    return re.sub(r"\bFILE\b", "docs/troubleshooting.md", text)


@pytest.fixture(scope="module")
def server(demo_path: Path) -> Iterator[ServerProcess]:
    flags = ["--port", "0", "--chat-template", "plain", "--max-model-len", "1024"]
    with started("tokenspeed.cli.main", ["serve", *flags]) as process:
        process.wait_until_ready()
        yield process
        assert process.terminate() == 0, process.log


@pytest.mark.parametrize("command", of("run"))
def test_run(run: Callable[[str], str], command: str) -> None:
    assert run(command).strip() or command.endswith("bench.table")


@pytest.mark.parametrize("command", of("help"))
def test_the_command_is_known(run: Callable[[str], str], command: str) -> None:
    assert f"usage: {command}" in run(f"{command} --help")


@pytest.mark.parametrize("command", of("serve"))
def test_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, demo_path: Path, command: str) -> None:
    words = shlex.split(_filled(command, demo_path))
    for name, value in (word.split("=", 1) for word in words if re.match(r"[A-Z_]+=", word)):
        monkeypatch.setenv(name, value)
    flags = words[words.index("serve") :]
    if "serve.yaml" in flags:
        page = (ROOT / "docs" / "launching.md").read_text()
        (tmp_path / "serve.yaml").write_text(_filled(page.split("```yaml\n")[1].split("```")[0], demo_path))
        flags[flags.index("serve.yaml")] = str(tmp_path / "serve.yaml")
    with started("tokenspeed.cli.main", [*flags, "--port", "0", "--max-model-len", "256"]) as process:
        process.wait_until_ready()
        assert process.get("/v1/models").json()["data"]
        assert process.terminate() == 0, process.log


@pytest.mark.parametrize("command", of("load"))
def test_load(run: Callable[[str], str], copy: Path, server: ServerProcess, command: str) -> None:
    (copy / "conversation_trace.jsonl").write_text(TRACE)
    words = shlex.split(command)
    for flag, value in SMALLER.items():
        if flag in words:
            words[words.index(flag) + 1] = value
    if "--base-url" in words:
        del words[words.index("--base-url") : words.index("--base-url") + 2]
    assert "ttft" in run(shlex.join([*words, "--base-url", server.url])).lower()


@pytest.mark.parametrize("each", [each for each in SHOWN if each.kind == PYTHON and each.page not in SNIPPETS])
def test_python(run: Callable[[str], str], copy: Path, server: ServerProcess, each: Shown, demo_path: Path) -> None:
    code = _filled(each.text, demo_path).replace(f"http://{ADDRESS}", server.url)
    (copy / "shown.py").write_text(code)
    assert run("python shown.py").strip()
