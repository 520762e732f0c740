"""The one record behind every published figure, the JSON files in `benchmarks/results/` that keep them, and what a run
was made on and with. Records hold no host name, user or path."""

from __future__ import annotations

import datetime
import math
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Literal, TypedDict

import msgspec

from tokenspeed import __version__
from tokenspeed.bench.stats import GATE_RUNS, MedianInterval, Summary
from tokenspeed.contracts.errors import ConfigError, FormatError

ID_PATTERN = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9][a-z0-9_-]*)+")
"""Room or machine first, then ever finer: cpu.decode128.t1, host.step.b256.us, h200.llama-3.2-1b.bf16.decode.b8."""

TIMES = ("s", "ms", "us", "ns")
RATES = ("tok/s", "req/s", "events/s", "GB/s", "TB/s", "GFLOP/s", "TFLOP/s")
AMOUNTS = ("B", "MB", "GB", "MiB", "GiB", "tokens", "count", "x", "%", "nats", "ppl")
UNITS = frozenset(TIMES + RATES + AMOUNTS)
"""x is a plain ratio, % a hundredth of one, nats a difference of natural logarithms."""

LIBRARIES = ("torch", "numpy", "triton")
GENERATED = "benchmarks/results"
"""Results written by a run do not make the tree that ran it dirty."""

Metric = Literal["value", "ratio", "share", "weight_share", "bus_share"]


class Machine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the figure was measured on. cores: those this process may use; memory_gib: all of the machine's."""

    cpu: str
    cores: int
    memory_gib: float
    gpu: str | None = None
    gpus: int = 0


class Surroundings(TypedDict):
    """The fields of a `Record` that are the same for every figure of one run."""

    command: str
    commit: str | None
    versions: dict[str, str]
    machine: Machine
    date: datetime.date


class Target(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a figure has to reach: exactly one of the two bounds, on the record's field `of`."""

    of: Metric = "value"
    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        if (self.at_least is None) == (self.at_most is None):
            raise ConfigError(f"a target needs exactly one of at_least and at_most, got {self!r}")

    def met_by(self, figure: float) -> bool:
        """True on the bound itself."""
        return (self.at_least is None or figure >= self.at_least) and (self.at_most is None or figure <= self.at_most)


class Record(msgspec.Struct, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """One published figure. Raises ConfigError when a field is malformed or two fields contradict each other.

    value, peer_value, floor: in `unit`. ratio: value over peer_value within the pairs of one run, so the target says
    which direction is better. runs: where `value` is absolute, the runs whose lower quartile it is. floor: the physical
    limit. share: floor over value for times, value over floor for rates.
    weight_share: bytes that the file format requires over time; bus_share: bytes really read over time; both as parts
    of `ceiling_gb_s`, the bandwidth measured in the same run. Shares are parts of one, not per cent.
    samples: every figure by name, in run order. settings: what the id does not say of the work, by name.
    """

    id: str
    value: float
    unit: str
    target: Target | None = None
    peer: str | None = None
    """Name and version of what it was run against."""
    peer_value: float | None = None
    ratio: MedianInterval | None = None
    runs: Summary | None = None
    floor: float | None = None
    share: float | None = None
    weight_share: float | None = None
    bus_share: float | None = None
    ceiling_gb_s: float | None = None
    command: str
    commit: str | None
    versions: dict[str, str]
    machine: Machine
    date: datetime.date
    samples: dict[str, list[float]] = {}
    settings: dict[str, str | float] = {}

    def __post_init__(self) -> None:
        _require(ID_PATTERN.fullmatch(self.id) is not None, self.id, "id must look like cpu.decode128.t1")
        _require(self.unit in UNITS, self.id, f"unknown unit {self.unit!r} (known: {', '.join(sorted(UNITS))})")
        _require(bool(self.command.strip()), self.id, "command is empty")
        for name, number in self._numbers().items():
            _require(number is None or math.isfinite(number), self.id, f"{name} is {number}, not a finite number")
        for name, figures in self.samples.items():
            _require(all(map(math.isfinite, figures)), self.id, f"samples {name!r} hold a number that is not finite")
        has_peer_figure = self.peer_value is not None or self.ratio is not None
        _require(self.peer is not None or not has_peer_figure, self.id, "peer_value and ratio need peer")
        is_quartile = self.runs is None or self.value == self.runs.lower_quartile
        _require(is_quartile, self.id, "value is not the lower quartile of its runs")
        has_bandwidth_share = self.weight_share is not None or self.bus_share is not None
        _require(self.ceiling_gb_s is not None or not has_bandwidth_share, self.id, "a share needs its ceiling_gb_s")

    def met(self) -> bool | None:
        """Whether the target is reached, a ratio by its median, the value of runs by their lower quartile.

        None without a target, without the field it is set on, and with fewer than GATE_RUNS runs.
        """
        if self.target is None:
            return None
        too_few = self.target.of == "value" and self.runs is not None and self.runs.count < GATE_RUNS
        figure = None if too_few else self._numbers()[self.target.of]
        return None if figure is None else self.target.met_by(figure)

    def _numbers(self) -> dict[str, float | None]:
        return {
            "value": self.value,
            "peer_value": self.peer_value,
            "ratio": self.ratio.median if self.ratio else None,
            "floor": self.floor,
            "share": self.share,
            "weight_share": self.weight_share,
            "bus_share": self.bus_share,
            "ceiling_gb_s": self.ceiling_gb_s,
        }


def read(path: str | os.PathLike[str]) -> list[Record]:
    """The records of a file, as they lie there. Raises FormatError naming the file, OSError when it cannot be read."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=list[Record])
    except msgspec.MsgspecError as error:
        raise FormatError(f"{path}: not a file of benchmark records: {error}") from error


def write(path: str | os.PathLike[str], records: Sequence[Record]) -> None:
    """Merge records into a file: those of the same id are replaced, the others stay. Sorted by id.

    Written whole or not at all. Raises ConfigError when an id comes twice in `records`, FormatError when the file there
    holds something else.
    """
    fresh = {record.id: record for record in records}
    if len(fresh) != len(records):
        raise ConfigError(f"{path}: an id occurs twice among the {len(records)} records to write")
    target = Path(path)
    kept = {record.id: record for record in read(target)} if target.exists() else {}
    merged = kept | fresh
    encoded = msgspec.json.encode([merged[key] for key in sorted(merged)], order="deterministic")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_bytes(msgspec.json.format(encoded, indent=2) + b"\n")
    scratch.replace(target)


def surroundings(command: str) -> Surroundings:
    """Take them all now: `Record(id=..., value=..., unit=..., **surroundings("make bench-cpu"))`.

    `command` is what a reader types in a checkout to repeat the run. The date is UTC's.
    """
    today = datetime.datetime.now(datetime.UTC).date()
    return Surroundings(command=command, commit=commit(), versions=versions(), machine=machine(), date=today)


def command_of(program: str, given: Sequence[str]) -> str:
    """What a reader types to repeat a run, without where the results went, and without folders of this machine."""
    kept = [each for before, each in zip(["", *given], given, strict=False) if "--out" not in (before, each)]
    named = [Path(each).name if "/" in each else each for each in kept if not each.startswith("--out=")]
    return f"{program} {shlex.join(named)}".strip()


def machine() -> Machine:
    """This machine. A GPU is named only if torch is imported already: asking must not load it."""
    gpu, gpus = _gpu()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Machine(cpu=_cpu_model(), cores=_usable_cores(), memory_gib=round(memory / 2**30, 1), gpu=gpu, gpus=gpus)


def versions() -> dict[str, str]:
    """Version by name: python, tokenspeed, and whichever of torch, numpy, triton is installed. Imports none of them."""
    found = {"python": platform.python_version(), "tokenspeed": __version__}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(directory: Path | None = None) -> str | None:
    """Hash of the checked-out commit, with "-dirty" when a tracked file differs; None where there is none, or no git.

    directory: somewhere in the checkout, by default this package's. An installed copy inside someone else's repository
    is not in a checkout: the directory itself must hold tracked files.
    """
    directory = directory or Path(__file__).resolve().parent
    revision = _git(directory, "rev-parse", "--verify", "HEAD")
    if not revision or not _git(directory, "ls-files", "."):
        return None
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no", ":/", f":(top,exclude){GENERATED}")
    return f"{revision}-dirty" if changes else revision


def _require(ok: bool, record_id: str, problem: str) -> None:
    if not ok:
        raise ConfigError(f"record {record_id!r}: {problem}")


def _git(directory: Path, *arguments: str) -> str | None:
    try:
        command = ["git", "-C", str(directory), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(models, "") or platform.processor() or platform.machine()


def _usable_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpu() -> tuple[str | None, int]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return None, 0
    return torch.cuda.get_device_name(0), torch.cuda.device_count()
