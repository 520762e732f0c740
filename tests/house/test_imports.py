"""The rows of the house: what import-linter checks in the source, and what a process has really loaded."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINTER = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
TORCH_FREE = next(contract["source_modules"] for contract in LINTER["contracts"] if contract["id"] == "torch-free")
SERVING = next(contract["source_modules"] for contract in LINTER["contracts"] if contract["id"] == "serving")
EXPECTED_TORCH_FREE = ("cache", "config", "contracts", "formats", "parsing", "scheduler", "server", "tokenizer")

IMPORT_ALL = """
import importlib, pkgutil, sys
for room in sys.argv[1:]:
    package = importlib.import_module(room)
    for module in pkgutil.walk_packages(getattr(package, "__path__", []), room + "."):
        importlib.import_module(module.name)
        assert "torch" not in sys.modules, f"{module.name} has imported torch"
    assert "torch" not in sys.modules, f"{room} has imported torch"
"""
HELP = """
import sys
from tokenspeed.cli.main import main
sys.argv = ["tokenspeed", "--help"]
try:
    status = main()
except SystemExit as stop:
    status = stop.code
assert not status, status
assert "torch" not in sys.modules, "tokenspeed --help has imported torch"
"""


LINT = """
import sys
# An editable install redirects imports of the package to the checkout.
sys.meta_path[:] = [finder for finder in sys.meta_path if "editable" not in type(finder).__module__]
from importlinter.cli import lint_imports_command
lint_imports_command()
"""


def python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """import-linter's verdict on a tree, whose package comes before any installed one."""
    return python(LINT, "--no-logo", "--no-cache", cwd=tree)


def test_every_torch_free_room_that_exists_is_under_the_contract():
    places = [(room, ROOT / "tokenspeed" / room) for room in EXPECTED_TORCH_FREE]
    rooms = {f"tokenspeed.{room}" for room, path in places if path.is_dir() or path.with_suffix(".py").exists()}
    assert set(TORCH_FREE) == rooms


def test_torch_free_rooms_load_without_torch():
    done = python(IMPORT_ALL, *TORCH_FREE)
    assert done.returncode == 0, done.stderr


def test_the_serving_side_of_the_engine_loads_without_torch():
    done = python(IMPORT_ALL, *SERVING)
    assert done.returncode == 0, done.stderr
    files = {f"tokenspeed.engine.{path.stem}" for path in (ROOT / "tokenspeed" / "engine").glob("[a-z]*.py")}
    torch_side = ("capacity", "core", "decode_floor", "floor", "llm", "timings")
    assert set(SERVING) == files - {f"tokenspeed.engine.{name}" for name in torch_side}


def test_the_check_sees_a_room_that_loads_torch(tmp_path):
    for name, text in {"torch.py": "", "room/__init__.py": "", "room/a.py": "", "room/b.py": "import torch"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    done = python(IMPORT_ALL, "room", cwd=tmp_path)
    assert done.returncode != 0
    assert "room.b has imported torch" in done.stderr


def test_command_line_help_loads_without_torch():
    done = python(HELP)
    assert done.returncode == 0, done.stderr
    assert "generate" in done.stdout


def build_house(directory: Path, files: dict[str, str]) -> None:
    """A tree with this house's contracts and rooms, its modules empty but for `files`."""
    shutil.copy(ROOT / "pyproject.toml", directory)
    rooms = [path.parent.name for path in (ROOT / "tokenspeed").glob("*/__init__.py")]
    modules = [f"{module.replace('.', '/')}.py" for module in (*SERVING, "tokenspeed.engine.core")]
    for path in ["tokenspeed/__init__.py", *(f"tokenspeed/{room}/__init__.py" for room in rooms), *modules]:
        (directory / path).parent.mkdir(parents=True, exist_ok=True)
        (directory / path).write_text("")
    for name, text in files.items():
        (directory / "tokenspeed" / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / "tokenspeed" / name).write_text(text)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"engine/core.py": "import tokenspeed.scheduler", "cli/main.py": "import tokenspeed.bench"},
        {"bench/run.py": "from tokenspeed.engine import llm", "engine/llm.py": "import torch"},
        {"server/app.py": "import tokenspeed.engine", "server/__init__.py": ""},
    ],
    ids=["empty", "downwards", "same row", "a later room"],
)
def test_allowed_imports_pass(tmp_path, files):
    build_house(tmp_path, files)
    done = lint_imports(tmp_path)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "files, complaint",
    [
        ({"ops/bad.py": "import tokenspeed.program"}, "tokenspeed.ops is not allowed to import tokenspeed.program"),
        ({"cache/bad.py": "def f():\n    import tokenspeed.engine"}, "not allowed to import tokenspeed.engine"),
        ({"engine/a.py": "import tokenspeed.bench.b", "bench/b.py": "import tokenspeed.engine.a"}, "acyclic BROKEN"),
        ({"cache/bad.py": "import torch"}, "tokenspeed.cache is not allowed to import torch"),
        ({"formats/bad.py": "import tokenspeed.contracts.c", "contracts/c.py": "import torch"}, "is not allowed to"),
        ({"attic/__init__.py": ""}, "attic"),
        (
            {"engine/async_engine.py": "import tokenspeed.engine.core"},
            "to import tokenspeed.engine.core",
        ),
    ],
    ids=[
        "upwards",
        "upwards inside a function",
        "cycle in a row",
        "torch",
        "torch through another",
        "unknown room",
        "the core",
    ],
)
def test_forbidden_imports_break_a_contract(tmp_path, files, complaint):
    build_house(tmp_path, files)
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "BROKEN" in done.stdout
    assert complaint in done.stdout
