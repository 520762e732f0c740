"""The engines of a comparison: how each is started, by its own published command line, and what it says of itself."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from tokenspeed.bench import llama_cpp
from tokenspeed.bench.running_server import free_port, our_command, serving
from tokenspeed.bench.sse_client import Client, Endpoint, RequestFailed
from tokenspeed.config.demo import demo_model_path
from tokenspeed.contracts.errors import ConfigError

NAME = re.compile(r"[a-z0-9][a-z0-9_-]*")
TELLING = ("/version", "/v1/models", "/props", "/get_server_info", "/server_info")
"""Asked of every engine: vLLM, SGLang, TensorRT-LLM, llama.cpp and TokenSpeed answer some of them each."""
VERSIONS = ("version", "build_info", "sglang_version")
_LONG, _DEEP = 200, 4


def _llama_server(model: str, port: int, flags: Sequence[str]) -> list[str]:
    found = shutil.which(llama_cpp.SERVER)
    program = found or str(llama_cpp.build(targets=[llama_cpp.SERVER]) / llama_cpp.SERVER)
    return [program, "--model", model, "--port", str(port), *flags]


def _sglang(model: str, port: int, flags: Sequence[str]) -> list[str]:
    return ["python3", "-m", "sglang.launch_server", "--model-path", model, "--port", str(port), *flags]


Command = Callable[[str, int, Sequence[str]], list[str]]
PROGRAMS: dict[str, Command] = {
    "tokenspeed": lambda model, port, flags: our_command(port, model, *flags),
    "vllm": lambda model, port, flags: ["vllm", "serve", model, "--port", str(port), *flags],
    "sglang": _sglang,
    "trtllm": lambda model, port, flags: ["trtllm-serve", model, "--port", str(port), *flags],
    "llama.cpp": _llama_server,
}
"""By the first word of an engine: its command line of a model, a port and further flags."""
_LOCAL = ("tokenspeed", "llama.cpp")


@dataclass
class Engine:
    """One side of a comparison. words: of its command line, or a lone URL. extra: fields of each request.

    told: what it said of itself when it was asked last, by name. shown: its command without folders of this machine.
    """

    name: str
    words: list[str]
    extra: dict[str, Any] = field(default_factory=dict)
    told: dict[str, str | float] = field(default_factory=dict)
    shown: str = ""

    @classmethod
    def parse(cls, text: str, extra: dict[str, Any]) -> Engine:
        """From NAME=URL, NAME="PROGRAM MODEL [FLAGS]" or NAME="COMMAND with {port}". Raises ConfigError."""
        name, given, spec = text.partition("=")
        try:
            words = shlex.split(spec)
        except ValueError as error:
            raise ConfigError(f"--engine {name}: {error}") from None
        if not given or not words or NAME.fullmatch(name) is None:
            raise ConfigError(f"--engine must look like NAME=URL or NAME='PROGRAM MODEL FLAGS', got {text!r}")
        engine = cls(name, words, extra)
        if engine.url is not None:
            Endpoint.parse(engine.url)
        elif not engine.is_command and (words[0] not in PROGRAMS or len(words) < 2):
            known = ", ".join(PROGRAMS)
            raise ConfigError(f"--engine {name}: needs a URL, PROGRAM MODEL ({known}), or a command with {{port}}")
        return engine

    @property
    def url(self) -> str | None:
        """Of an endpoint that runs already."""
        return self.words[0] if len(self.words) == 1 and "://" in self.words[0] else None

    @property
    def is_command(self) -> bool:
        """Whether the words are a whole command line, with a place for the port."""
        return any("{port}" in word for word in self.words)

    @property
    def version(self) -> str:
        """As it told; "unknown" before, or where it does not."""
        told = [str(value) for key, value in self.told.items() if key.split(".")[-1] in VERSIONS]
        return told[0] if told else "unknown"

    def command(self, port: int) -> list[str]:
        """What starts it at a port. llama.cpp's server is built on first use. Raises ConfigError where that fails."""
        if self.is_command:
            return [word.replace("{port}", str(port)) for word in self.words]
        program, model, *flags = self.words
        if model == "demo" and program in _LOCAL:
            model = str(demo_model_path())
        return PROGRAMS[program](model, port, flags)

    @contextmanager
    def running(self, ready_s: float) -> Iterator[str]:
        """Its address, started where it has to be and ended again. Raises ConfigError where it does not start."""
        if self.url is not None:
            self.shown = self.url
            yield self.url
            return
        port = free_port()
        command = self.command(port)
        self.shown = shlex.join("PORT" if word == str(port) else plain(word) for word in command)
        with serving(command, port, ready_s) as server:
            yield server.url


def plain(word: str) -> str:
    """A word without the folders of this machine, an interpreter by the name that others have it under."""
    return "python3" if word == sys.executable else Path(word).name if word.startswith("/") else word


async def ask(client: Client) -> dict[str, str | float]:
    """What an engine says of itself: the plain values of every answer, by path and key. What it lacks is left out."""
    told: dict[str, str | float] = {}
    endpoint = client.endpoint
    for path in TELLING:
        lines = [f"GET {path} HTTP/1.1", f"Host: {endpoint.host}:{endpoint.port}", *endpoint.headers]
        try:
            answer = msgspec.json.decode(await client.post("\r\n".join(lines).encode() + b"\r\n\r\n"))
        except (OSError, RequestFailed, msgspec.MsgspecError):
            continue
        told |= _flat(path.rsplit("/", 1)[-1], answer, _DEEP)
    return told


def _flat(name: str, value: Any, depth: int) -> dict[str, str | float]:
    if isinstance(value, bool):
        return {name: str(value).lower()}
    if isinstance(value, int | float):
        return {name: value}
    if isinstance(value, str):
        return {name: plain(value)} if 0 < len(value) <= _LONG and "\n" not in value else {}
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: dict[str, str | float] = {}
    for key, each in pairs if depth else ():
        found |= _flat(f"{name}.{key}", each, depth - 1)
    return found
