"""How fast a checkpoint in the page cache is read, and how fast the engine loads it.

A checkpoint of a model's shapes with random values is written, loaded as `LLM` does, and read by several threads into
host buffers. All count the bytes of the files' tensors. No load can be faster than the slower of two: the link to the
device, and reading into buffers that are used again and again.
"""

from __future__ import annotations

import itertools
import os
import resource
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from tokenspeed.bench.gpu.publish import Publisher
from tokenspeed.bench.gpu.random_checkpoint import checkpoint_bytes, resized, write_checkpoint
from tokenspeed.bench.gpu.setup import free_memory, machine_name
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.models.registry import read_json, shipped_configs
from tokenspeed.runner.build import open_model, prepare
from tokenspeed.runner.gpu.backend import GpuBackend
from tokenspeed.runner.model import load_model
from tokenspeed.weights.packed import Weight
from tokenspeed.weights.reading import read_to
from tokenspeed.weights.staging import Times
from tokenspeed.weights.tasks import usable_cores

MIB = 1 << 20
RUNS = 3
READERS = (6, 8, 10, 12, 16)
BUFFER_BYTES = (4 * MIB, 8 * MIB, 12 * MIB)
KEPT_BYTES = 8 * MIB
"""Read at once into memory that is kept."""
_COMPARED_ROWS = 7


@dataclass(frozen=True)
class Load:
    """Seconds of one load: opening the files, reading and copying, and all else."""

    open: float
    copy: float
    rest: float

    @property
    def seconds(self) -> float:
        return self.open + self.copy + self.rest


def run_loading(
    model: str, device: str, publisher: Publisher, folder: Path | None, size_gb: float | None, runs: int = RUNS
) -> None:
    """Write, read, load, publish; the files are deleted at the end. folder: where there is room for them, by default
    the system's folder for such. size_gb: None for all layers of the model. Raises ConfigError where there is no
    room."""
    settings = shipped_configs().get(model) or read_json(Path(model) / "config.json")
    settings = settings if size_gb is None else resized(settings, size_gb * 1e9)
    with tempfile.TemporaryDirectory(dir=folder) as made:
        _check_room(Path(made), checkpoint_bytes(settings))
        started = time.perf_counter()
        nbytes = write_checkpoint(Path(made), settings)
        print(f"{nbytes / 1e9:.2f} GB written in {time.perf_counter() - started:.1f} s", flush=True)
        _measure(Path(made), nbytes, device, publisher, runs)


def _check_room(folder: Path, nbytes: int) -> None:
    disk = os.statvfs(folder)
    free = disk.f_bavail * disk.f_frsize
    if free < nbytes * 1.02:
        raise ConfigError(f"{folder}: has {free / 1e9:.1f} GB free, the checkpoint takes {nbytes / 1e9:.1f} GB")


def _measure(folder: Path, nbytes: int, device: str, publisher: Publisher, runs: int) -> None:
    files, stem = sorted(folder.glob("*.safetensors")), f"{machine_name(device)}.loading"
    _settle(device)  # the device's own libraries are in memory from here on
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loads = [load_once(folder, device) for _ in range(runs)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    speeds = [nbytes / 1e9 / load.seconds for load in loads]
    samples = {part: [getattr(load, part) for load in loads] for part in ("open", "copy", "rest")}
    for part, seconds in samples.items():
        print(f"  {part}: {', '.join(f'{each:.3f}' for each in seconds)} s")
    print(f"  peak of host memory grew by {grown:.0f} MB", flush=True)
    link = {} if device == "cpu" else link_gbs(device)
    read = _sweep(folder, files, nbytes, device)
    kept = [nbytes / 1e9 / keep_seconds(files, readers) for readers in readers_here()]
    publisher.add(f"{stem}.kept_gbs", max(kept), "GB/s", samples={"by_readers": kept})
    publisher.add(f"{stem}.read_gbs", max(read), "GB/s", samples={"by_setting": read})
    if link:
        publisher.add(f"{stem}.link_gbs", max(link.values()), "GB/s", samples={k: [v] for k, v in link.items()})
    publisher.add(f"{stem}.load_gbs", median(speeds), "GB/s", samples={"gb_per_s": speeds, **samples})
    ceiling = min(max(read), max(link.values(), default=max(read)))
    publisher.add(f"{stem}.load_share", median(speeds) / ceiling, "x")


def _sweep(folder: Path, files: Sequence[Path], nbytes: int, device: str) -> list[float]:
    """GB/s into buffers by number of readers and size of buffers; prints what the engine's readers make of it."""
    speeds = []
    for readers, buffer_bytes in itertools.product(readers_here(), BUFFER_BYTES):
        found = nbytes / 1e9 / read_seconds(files, readers, buffer_bytes, device)
        seconds, times = place_seconds(folder, readers, buffer_bytes, device)
        spent = [each / readers / seconds for each in (times.waiting, times.reading, times.sending)]
        speeds.append(found)
        share = f"waiting {spent[0]:.0%}, reading {spent[1]:.0%}, sending {spent[2]:.0%}"
        name, placed = f"{readers} readers, {buffer_bytes // MIB} MiB", nbytes / 1e9 / seconds
        print(f"  {name}: into buffers {found:.1f} GB/s, to the device {placed:.1f} GB/s; {share}", flush=True)
    return speeds


def readers_here() -> list[int]:
    """Numbers of readers to try, as far as there are cores."""
    return sorted({min(count, usable_cores()) for count in READERS})


def link_gbs(device: str, nbytes: int = 256 * MIB, repeats: int = 8) -> dict[str, float]:
    """Copies of one host buffer to the device: pinned by one stream and by two, and pageable."""
    target = torch.empty(nbytes, dtype=torch.uint8, device=device)
    found = {}
    for name, pinned, count in (("pinned", True, 1), ("pinned, 2 streams", True, 2), ("pageable", False, 1)):
        source = torch.ones(nbytes, dtype=torch.uint8).pin_memory() if pinned else torch.ones(nbytes, dtype=torch.uint8)
        streams = [torch.cuda.Stream() for _ in range(count)]
        target.copy_(source)
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(repeats):
            for number, stream in enumerate(streams):
                part = slice(number * nbytes // count, (number + 1) * nbytes // count)
                with torch.cuda.stream(stream):
                    target[part].copy_(source[part], non_blocking=True)
        torch.cuda.synchronize()
        found[name] = repeats * nbytes / 1e9 / (time.perf_counter() - started)
        print(f"  {name} memory to the device: {found[name]:.1f} GB/s", flush=True)
    return found


def keep_seconds(files: Sequence[Path], readers: int) -> float:
    """Of reading whole files into fresh host memory that holds all of them."""
    sizes = [file.stat().st_size for file in files]
    room = torch.empty(sum(sizes), dtype=torch.uint8).numpy().data
    starts = itertools.accumulate(sizes, initial=0)
    spans = [(f, at, start + at) for f, size, start in zip(files, sizes, starts, strict=False)
             for at in range(0, size, KEPT_BYTES)]  # fmt: skip
    return _read_spans([(f, at, min(KEPT_BYTES, f.stat().st_size - at), to) for f, at, to in spans], readers, room)


def _read_spans(spans: Sequence[tuple[Path, int, int, int]], readers: int, room: memoryview) -> float:
    """Seconds. spans: file, first byte, bytes, and where in `room` they go."""
    descriptors = {file: os.open(file, os.O_RDONLY) for file, *_ in spans}
    todo = iter(spans)

    def read(_: int) -> None:
        while (span := next(todo, None)) is not None:
            file, at, count, to = span
            done = 0
            while done < count:
                done += os.preadv(descriptors[file], [room[to + done : to + count]], at + done)

    try:
        with ThreadPoolExecutor(readers) as pool:
            started = time.perf_counter()
            list(pool.map(read, range(readers)))
            return time.perf_counter() - started
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def read_seconds(files: Sequence[Path], readers: int, buffer_bytes: int, device: str) -> float:
    """Of reading whole files into one buffer per thread, pinned where the device is a GPU."""
    descriptors = [os.open(file, os.O_RDONLY) for file in files]
    spans = iter([(d, at) for d in descriptors for at in range(0, os.fstat(d).st_size, buffer_bytes)])
    buffers = [torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=device != "cpu") for _ in range(readers)]

    def read(buffer: torch.Tensor) -> None:
        view = buffer.numpy().data
        while (span := next(spans, None)) is not None:
            os.preadv(span[0], [view], span[1])

    try:
        with ThreadPoolExecutor(readers) as pool:
            started = time.perf_counter()
            list(pool.map(read, buffers))
            return time.perf_counter() - started
    finally:
        for descriptor in descriptors:
            os.close(descriptor)


def place_seconds(folder: Path, readers: int, buffer_bytes: int, device: str) -> tuple[float, Times]:
    """Of the engine's readers alone, from files that are open."""
    config = EngineConfig.from_kwargs({"model": str(folder), "device": device})
    found = open_model(config)
    model, times = load_model(found.definition, found.checkpoint, config), Times()
    started = time.perf_counter()
    kept = dict(read_to(model.device, model.packed, model.dtype, None, readers, buffer_bytes, times))
    _settle(device)
    seconds = time.perf_counter() - started
    del kept
    return seconds, times


def load_once(folder: Path, device: str) -> Load:
    """Load as `LLM` does, up to the KV cache, and compare some rows with the file. Raises ConfigError where they
    differ."""
    config = EngineConfig.from_kwargs({"model": str(folder), "device": device})
    free_memory(device)
    marks = [time.perf_counter()]
    found = open_model(config)
    marks.append(time.perf_counter())
    reported: list[float] = []
    prepared = prepare(found, config, lambda done, total: reported.append(time.perf_counter()))
    _settle(device)
    whole = time.perf_counter() - marks[0]
    opened, copied = marks[1] - marks[0], reported[-1] - reported[0]
    packed = load_model(found.definition, found.checkpoint, config).packed
    if isinstance(prepared.backend, GpuBackend):
        _compare(prepared.backend, packed)
    return Load(opened, copied, whole - opened - copied)


def _compare(backend: GpuBackend, packed: Mapping[str, Weight]) -> None:
    """The last rows of every weight, which come as they are."""
    for name, weight in packed.items():
        loaded, segment = backend.weights[name], weight.segments[-1]
        assert isinstance(loaded, torch.Tensor)
        wanted = segment.rows_at(max(0, segment.rows - _COMPARED_ROWS), segment.rows).reshape(-1)
        if not torch.equal(loaded.view(-1).view(torch.uint8)[-len(wanted) :].cpu(), wanted):
            raise ConfigError(f"weight {name} is not what the file says")


def _settle(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()
