"""Writes docs/third-party-licences.md from the installed packages: `python -m tools.licences_page`."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "third-party-licences.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BY_TORCH = re.compile(r"triton|nvidia-|cuda-|intel-|tbb")
"""Each GPU build of torch brings its own."""
BUILT_IN = (("nanobind", "BSD-3-Clause"), ("robin-map (within nanobind)", "MIT"))
"""Compiled into the extension of a wheel."""
SAID_ELSEWHERE = {"annotated-doc": "MIT"}
"""Licences of packages whose metadata is silent."""
HEAD = """\
# Licences of others

Made by `python -m tools.licences_page` from the metadata of installed packages, in the versions of `constraints.txt`.

TokenSpeed itself is under Apache-2.0. No source of another project is in its tree. A wheel holds, compiled in:

| | licence |
|---|---|
"""
INSTALL = """
An install without extras brings these packages, on Linux with torch's CPU build:

| package | version | licence |
|---|---|---|
"""
REST = """
torch's builds for CUDA also bring NVIDIA's libraries, under NVIDIA's licences, and triton (MIT). The extra `gpu`
brings triton, `cuda-core` and `cuda-bindings` (Apache-2.0), and NVRTC under NVIDIA's licence. The extra `demo` brings
Gemma 3 270M, under the [Gemma terms of use](https://ai.google.dev/gemma/terms). Other extras are tools for
development.
"""


def page() -> str:
    """The whole text."""
    built = "".join(f"| {name} | {licence} |\n" for name, licence in BUILT_IN)
    rows = "".join(f"| {name} | {_version(name)} | {licence_of(name)} |\n" for name in installed())
    return HEAD + built + INSTALL + rows + REST


def _version(name: str) -> str:
    """Without the name of torch's build."""
    return metadata.version(name).partition("+")[0]


def installed() -> list[str]:
    """The distributions that the base install needs, directly or not."""
    seen: set[str] = set()
    queue = [(Requirement(text), frozenset[str]()) for text in PROJECT["dependencies"]]
    while queue:
        requirement, extras = queue.pop()
        if not _wanted(requirement, extras):
            continue
        name = canonicalize_name(requirement.name)
        if name in seen or BY_TORCH.match(name):
            continue
        seen.add(name)
        given = frozenset(requirement.extras)
        queue += [(Requirement(text), given) for text in metadata.requires(name) or []]
    return sorted(seen)


def _wanted(requirement: Requirement, extras: frozenset[str]) -> bool:
    marker = requirement.marker
    return marker is None or any(marker.evaluate({"extra": extra}) for extra in extras | {""})


def licence_of(name: str) -> str:
    """By the metadata's SPDX expression, else its classifiers, else its licence field. Raises LookupError where it has
    none of them in a line."""
    known = metadata.metadata(name)
    classified = [
        text.rpartition(" :: ")[2] for text in known.get_all("Classifier") or [] if text.startswith("License :: ")
    ]
    found = known["License-Expression"] or ", ".join(classified) or known["License"] or SAID_ELSEWHERE.get(name)
    if not found or "\n" in found.strip():
        raise LookupError(f"{name} states no licence in a line: look it up and add it to SAID_ELSEWHERE")
    return str(found).strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
