"""How fast a checkpoint in the page cache is read, and how fast the engine loads it.

A checkpoint of a model's shapes with random values is written, read by several threads into host buffers, then loaded
as `LLM` does. Both count the bytes of the files' tensors.
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
from tokenspeed.weights.placing import read_to
from tokenspeed.weights.tasks import usable_cores

MIB = 1 << 20
RUNS = 3
READERS = (4, 8, 16)
BUFFER_BYTES = (2 * MIB, 8 * MIB, 32 * MIB)
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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    read_seconds(files, max(READERS), 8 * MIB, device)  # what the cache has lost comes back
    read, by_setting = 0.0, {}
    for readers, buffer_bytes in settings_here():
        found = nbytes / 1e9 / read_seconds(files, readers, buffer_bytes, device)
        placed = nbytes / 1e9 / place_seconds(folder, readers, buffer_bytes, device)
        name = f"{readers} readers, {buffer_bytes // MIB} MiB"
        print(f"  {name}: read {found:.1f} GB/s, to the device {placed:.1f} GB/s", flush=True)
        by_setting[name], read = [found, placed], max(read, found)
    loads = [load_once(folder, device) for _ in range(runs)]
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    speeds = [nbytes / 1e9 / load.seconds for load in loads]
    samples = {part: [getattr(load, part) for load in loads] for part in ("open", "copy", "rest")}
    for part, seconds in samples.items():
        print(f"  {part}: {', '.join(f'{each:.3f}' for each in seconds)} s")
    print(f"  peak of host memory grew by {grown:.0f} MB")
    publisher.add(f"{stem}.read_gbs", read, "GB/s", samples=by_setting)
    publisher.add(f"{stem}.load_gbs", median(speeds), "GB/s", samples={"gb_per_s": speeds, **samples})
    publisher.add(f"{stem}.load_share", median(speeds) / read, "x")


def settings_here() -> list[tuple[int, int]]:
    """Readers and buffer sizes to try, as far as there are cores."""
    readers = sorted({min(count, usable_cores()) for count in READERS})
    return list(itertools.product(readers, BUFFER_BYTES))


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


def place_seconds(folder: Path, readers: int, buffer_bytes: int, device: str) -> float:
    """Of the engine's readers alone, from files that are open."""
    config = EngineConfig.from_kwargs({"model": str(folder), "device": device})
    found = open_model(config)
    model = load_model(found.definition, found.checkpoint, config)
    started = time.perf_counter()
    kept = dict(read_to(model.device, model.packed, model.dtype, None, readers, buffer_bytes))
    _settle(device)
    seconds = time.perf_counter() - started
    del kept
    return seconds


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
