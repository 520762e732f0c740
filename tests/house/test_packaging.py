"""What an install needs: declared dependencies, a pin for each, the whole package in the wheel, two commands."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if line and line[0] != "#")
PINNED = {canonicalize_name(name): version for name, version in PINS.items()}
CHOSEN_BY_TORCH = re.compile(r"triton|nvidia-|cuda-|intel-|tbb")
"""Libraries of torch's GPU builds: each build pins its own."""


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make as from a shell: these tests may themselves run below a make that hands down its flags."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(text).name) for text in requirements}


def closure(wanted: set[str]) -> set[str]:
    """The installed distributions that these need, directly or not."""
    seen: set[str] = set()
    queue = sorted(wanted)
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                queue.append(canonicalize_name(requirement.name))
    return seen


def imported_roots(files: list[Path]) -> dict[str, Path]:
    """Top-level module by name, with a file that imports it."""
    found: dict[str, Path] = {}
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                modules = [node.module]
            found |= {module.split(".")[0]: path for module in modules}
    return found


def undeclared(files: list[Path], declared: set[str]) -> list[str]:
    providers = metadata.packages_distributions()
    problems = []
    for module, path in imported_roots(files).items():
        local = (ROOT / module).is_dir() or any(other.stem == module for other in ROOT.glob("t*/**/*.py"))
        if module in sys.stdlib_module_names or local:
            continue
        distributions = {canonicalize_name(name) for name in providers.get(module, [module])}
        if not distributions & declared:
            problems.append(f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not declare")
    return problems


def test_the_package_imports_only_what_it_declares():
    extras = [text for extra in ("demo", "gpu", "bench", "report", "traces") for text in EXTRAS[extra]]
    declared = names(PROJECT["dependencies"] + extras)
    assert undeclared(sorted((ROOT / "tokenspeed").rglob("*.py")), declared) == []


def test_the_tests_import_only_what_is_declared():
    declared = names(PROJECT["dependencies"] + EXTRAS["demo"] + EXTRAS["dev"] + EXTRAS["docs"])
    assert undeclared(sorted((ROOT / "tests").rglob("*.py")) + sorted((ROOT / "tools").rglob("*.py")), declared) == []


def test_everything_that_make_installs_is_pinned():
    wanted = names(PROJECT["dependencies"] + EXTRAS["demo"] + EXTRAS["dev"] + EXTRAS["docs"])
    assert [name for name in sorted(closure(wanted)) if name not in PINNED and not CHOSEN_BY_TORCH.match(name)] == []


@pytest.mark.parametrize("extra", ["", "demo", "dev", "docs"])
def test_pins_lie_within_the_declared_ranges(extra):
    for text in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(text)
        if CHOSEN_BY_TORCH.match(requirement.name):
            continue
        assert requirement.specifier.contains(PINNED[canonicalize_name(requirement.name)]), text


def test_constraints_work_with_any_registry():
    text = (ROOT / "constraints.txt").read_text()
    assert PINNED["torch"] == "2.13.0"
    assert not re.search(r"://|\+|@|^\s*-", text, re.MULTILINE)
    assert len(PINS) == len(PINNED)


def test_the_wheel_holds_every_file_of_the_package(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path)]
    # Without the C++, which takes a minute and is tested as it is installed.
    subprocess.run([*pip, "--config-settings=wheel.cmake=false"], cwd=ROOT, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    source = [
        path
        for path in (ROOT / "tokenspeed").rglob("*")
        if path.is_file() and not {"__pycache__", "src"} & set(path.parts) and path.suffix != ".so"
    ]
    missing = {str(path.relative_to(ROOT)) for path in source} - held
    assert missing == set()
    assert len(source) > 20
    assert any(name.endswith("licenses/LICENSE") for name in held)


@pytest.mark.parametrize("version, accepted", [((3, 10), False), ((3, 11), True), ((3, 13), True)])
def test_make_refuses_an_old_python_in_words(tmp_path, version, accepted):
    """A stand-in for python3 that is of the version asked for, and makes no environment."""
    fake = tmp_path / "python3"
    fake.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo Python {version[0]}.{version[1]}.9\n'
        f'[ "$1" = -c ] && exec {sys.executable} -c "import sys; sys.version_info = {(*version, 9)}; $2"\nexit 0\n'
    )
    fake.chmod(0o755)
    venv = tmp_path / "env"
    done = make(f"PYTHON={fake}", f"VENV={venv}", f"{venv}/bin/python")
    assert (done.returncode == 0) == accepted, done.stderr
    assert ("needs Python 3.11 or newer" in done.stderr) != accepted
    assert accepted or f"Python {version[0]}.{version[1]}.9" in done.stderr


@pytest.mark.parametrize("goal", ["test", "test-full"])
def test_pytest_is_the_last_thing_that_make_runs(tmp_path, goal):
    done = make("-n", goal, f"VENV={tmp_path}/env")
    assert done.returncode == 0, done.stderr
    commands = done.stdout.strip().splitlines()
    assert "-m pytest" in commands[-1]
    assert sum("-m pytest" in command for command in commands) == 1
    for check in ("ruff check", "ruff format --check", "mypy", "lint-imports", "size_report"):
        assert any(check in command for command in commands[:-1]), check


def test_continuous_integration_runs_make_test():
    script = (ROOT / ".ci" / "run").read_text().splitlines()
    assert script[0].startswith("#!")
    assert "set -euo pipefail" in script
    assert script[-1] == "make test"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100
