"""What a release is made of: lists that agree, and in `make test-full` the wheel itself, in a fresh environment."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import tokenspeed

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PINS = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split("\n") if line and line[0] != "#")


def test_the_version_is_one_that_the_rule_allows_and_the_changelog_begins_unreleased() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", tokenspeed.__version__)
    headings = re.findall(r"^## (.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert all(re.fullmatch(r"\d+\.\d+\.\d+, \d{4}-\d\d-\d\d", heading) for heading in headings[1:])


def test_nothing_can_be_uploaded_by_accident() -> None:
    assert "Private :: Do Not Upload" in PYPROJECT["project"]["classifiers"]


def test_wheels_are_configured_for_every_python_and_platform_that_is_promised() -> None:
    config = PYPROJECT["tool"]["cibuildwheel"]
    versions = re.findall(r":: (3\.\d+)'", str(PYPROJECT["project"]["classifiers"]))
    assert config["build"] == [f"cp{version.replace('.', '')}-*" for version in versions]
    assert (config["linux"]["archs"], config["macos"]["archs"]) == (["x86_64", "aarch64"], ["arm64"])
    assert "*-win*" in config["skip"]
    assert "not supported: use WSL" in (ROOT / "docs" / "releases.md").read_text()
    assert (ROOT / config["test-command"].split("{project}/")[1]).is_file()


def test_tools_of_a_release_are_pinned() -> None:
    pinned = {canonicalize_name(name): version for name, version in PINS.items()}
    for requirement in map(Requirement, PYPROJECT["project"]["optional-dependencies"]["release"]):
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_containers_get_only_what_they_copy() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    for path in (ROOT / "docker").glob("*.Dockerfile"):
        copied = re.findall(r"^COPY (?!--)(.*) \S+$", path.read_text(), re.MULTILINE)
        names = {name for line in copied for name in line.split()}
        assert names <= allowed, path
        assert all((ROOT / name).exists() for name in names)


@pytest.mark.slow
def test_the_wheel_works_in_a_fresh_environment(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PYTEST"))}
    done = subprocess.run(
        [str(ROOT / "tools" / "release.sh"), str(tmp_path)],
        env=environment | {"XDG_CACHE_HOME": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"tokenspeed {tokenspeed.__version__} works" in done.stdout
    (wheel,) = (tmp_path / "wheels").glob("*.whl")
    assert "manylinux" in wheel.name
    held = zipfile.ZipFile(wheel).namelist()
    assert any(name.startswith("tokenspeed/kernels/cpu/_walk") for name in held)
    assert not any("kernels/cpu/src" in name for name in held)
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    left_out = {name for name in set(tracked.split()) - names if not name.startswith((".", "benchmarks/results/"))}
    assert left_out == set()
    assert not any(name.endswith((".so", ".pyc")) for name in names)
