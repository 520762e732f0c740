"""guidellm as a second opinion on times: installed once from PyPI into an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import venv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed.bench.launch import run_program
from tokenspeed.config.paths import user_cache
from tokenspeed.contracts.errors import ConfigError

VERSION = "0.8.1"
NAME = f"guidellm {VERSION}"
TORCH = "torch==2.13.0"
"""What it needs of torch runs on the CPU; without a pin pip may fetch gigabytes."""


@dataclass(frozen=True)
class Said:
    """Medians of its requests in ms. tpot: what it calls the inter-token latency, per request; its own
    `time_per_output_token` counts the first token in."""

    ttft: float
    tpot: float
    requests: int


def install() -> Path:
    """The program; installed on first use, which takes some minutes. Raises ConfigError where pip fails."""
    folder = user_cache() / "peers" / f"guidellm-{VERSION}"
    program = folder / "bin" / "guidellm"
    if not program.is_file():
        venv.create(folder, with_pip=True)
        try:
            run_program([folder / "bin" / "python", "-m", "pip", "install", "--quiet", f"guidellm=={VERSION}", TORCH])
        except ConfigError:
            program.unlink(missing_ok=True)
            raise
    return program


def measure(program: Path, url: str, streams: int, requests: int, tokens: int) -> Said:
    """`requests` completions of `tokens` tokens, `streams` at once. Raises ConfigError where one of them fails."""
    with tempfile.TemporaryDirectory() as folder:
        prompts, out = Path(folder) / "prompts.jsonl", Path(folder) / "out.json"
        lines = [{"prompt": f"{number} " + "word " * 20, "output_tokens_count": tokens} for number in range(requests)]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = [str(program), "run", "--disable-console"]
        for flag, value in (
            ("backend", f"kind=openai_http,target={url},request_format=/v1/completions"),
            ("profile", f"kind=concurrent,streams={streams}"),
            ("constraint", f"kind=max_requests,count={requests}"),
            ("data", f"kind=json_file,path={prompts}"),
            ("output", f"kind=json,path={out}"),
        ):
            command += [f"--{flag}", value]
        offline = os.environ | {"HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=offline, capture_output=True, text=True, check=False)
        if done.returncode or not out.is_file():
            raise ConfigError(f"{NAME} failed ({done.returncode}): {(done.stderr or done.stdout).strip()[-500:]}")
        return read(json.loads(out.read_bytes()), requests)


def read(report: Mapping[str, Any], requests: int) -> Said:
    """What its report says. Raises ConfigError where not all requests were answered."""
    (benchmark,) = report["benchmarks"]
    metrics = benchmark["metrics"]
    ttft, itl = (metrics[name]["successful"] for name in ("time_to_first_token_ms", "inter_token_latency_ms"))
    answered = int(ttft["count"])
    if answered != requests:
        raise ConfigError(f"{NAME}: {answered} of {requests} requests were answered")
    return Said(float(ttft["median"]), float(itl["median"]), answered)
