"""lm-evaluation-harness against `tokenspeed serve`: its scores beside those of `LLM` itself.

    python -m venv /tmp/lm-eval && /tmp/lm-eval/bin/pip install 'lm_eval[api]==0.4.13'
    python -m tools.lm_eval_check --lm-eval /tmp/lm-eval/bin/lm_eval

Serves the demo model, or --model, writes a task of its own (questions with several endings, nothing is downloaded),
runs it with the harness's `local-completions`, which asks with `echo` and `logprobs`, and computes the same
log-likelihoods by `LLM`. Ends with 1 where a choice differs or a log-likelihood by more than 0.001 nats a token. The
harness brings some 760 MB of packages (no torch), so it has an environment of its own and no part in `make test-full`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenspeed.bench.launch import run_program
from tokenspeed.config.demo import demo_model_path
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM

QUESTIONS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    ("The capital of France is", ("Paris", "Rome", "a fish"), 0),
    ("Water freezes when it is very", ("hot", "cold", "loud"), 1),
    ("Two and two make", ("seven", "a house", "four"), 2),
    ("The sun rises in the", ("east", "west", "kitchen"), 0),
    ("A baby cat is called a", ("puppy", "kitten", "calf"), 1),
    ("Snow is", ("green", "white and cold", "made of iron"), 1),
    ("In the morning people often drink", ("coffee", "gravel", "a bicycle"), 0),
    ("Birds can fly because they have", ("wheels", "gills", "wings"), 2),
)
PER_TOKEN = 1e-3
NAME = "tokenspeed_choices"


def write_task(folder: Path) -> None:
    """A multiple-choice task over a file of questions."""
    lines = [json.dumps({"question": q, "choices": list(c), "gold": gold}) for q, c, gold in QUESTIONS]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "task.yaml").write_text(
        f"task: {NAME}\n"
        "dataset_path: json\n"
        f"dataset_kwargs:\n  data_files:\n    test: {folder / 'questions.jsonl'}\n"
        "test_split: test\n"
        "output_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\n'
        'doc_to_choice: "{{choices}}"\n'
        "doc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n    aggregation: mean\n    higher_is_better: true\n"
    )


@contextmanager
def served(model: str, log: Path) -> Iterator[str]:
    """The address of a server of the model, once it is ready. Raises ConfigError where it ends before."""
    command = [
        sys.executable,
        "-m",
        "tokenspeed.cli.main",
        "serve",
        model,
        "--port",
        "0",
        "--served-model-name",
        "tokenspeed",
    ]
    with log.open("w") as out:
        process = subprocess.Popen(command, stderr=out)
    try:
        while (url := _ready(log.read_text())) is None:
            if process.poll() is not None:
                raise ConfigError(f"the server ended: {log.read_text()[-500:]}")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def _ready(log: str) -> str | None:
    """The address that a server's log names, where it serves already."""
    found = re.search(r"http://[\d.]+:\d+", log)
    if found is None:
        return None
    try:
        with urllib.request.urlopen(f"{found[0]}/health"):
            return found[0]
    except OSError:
        return None


def harness(program: Path, url: str, folder: Path) -> list[list[float]]:
    """The log-likelihood that the harness found of each ending of each question."""
    out = folder / "out"
    arguments = f"model=tokenspeed,base_url={url}/v1/completions,num_concurrent=4,tokenizer_backend=remote"
    command: list[Any] = [program, "--model", "local-completions", "--model_args", arguments, "--tasks", NAME]
    command += ["--include_path", folder, "--output_path", out, "--log_samples"]
    done = run_program(command)
    print(done.stdout)
    (samples,) = out.rglob(f"samples_{NAME}_*.jsonl")
    found = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda each: each["doc_id"])
    return [[float(pair[0]) for pair in each["filtered_resps"]] for each in found]


def direct(llm: LLM, question: str, ending: str) -> tuple[float, int]:
    """The log-likelihood of an ending by the engine, and its tokens."""
    tokenizer = llm.get_tokenizer()
    whole = tokenizer.encode(f"{question} {ending}", add_special_tokens=False)
    known = tokenizer.encode(question, add_special_tokens=False)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    (output,) = llm.generate(prompt_token_ids=[whole], sampling_params=params, use_tqdm=False)
    assert output.prompt_logprobs is not None
    told = zip(whole[len(known) :], output.prompt_logprobs[len(known) :], strict=True)
    return sum(entry[token].logprob for token, entry in told if entry is not None), len(whole) - len(known)


def compare(found: Sequence[Sequence[float]], llm: LLM) -> bool:
    """Print both, ending by ending; whether they agree."""
    good = len(found) == len(QUESTIONS)
    for (question, endings, _), theirs in zip(QUESTIONS, found, strict=False):
        ours = [direct(llm, question, ending) for ending in endings]
        near = all(abs(a - b) <= PER_TOKEN * n for a, (b, n) in zip(theirs, ours, strict=True))
        best = [value for value, _ in ours]
        good &= near and best.index(max(best)) == max(range(len(theirs)), key=theirs.__getitem__)
        shown = ", ".join(f"{e!r} {a:.4f} / {b:.4f}" for e, a, (b, _) in zip(endings, theirs, ours, strict=True))
        print(f"{'ok' if near else 'WRONG':6} {question} ... {shown}")
    return good


def main() -> int:
    """Serve, ask by the harness, compute, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval", type=Path, required=True, metavar="PROGRAM", help="where lm_eval is installed")
    parser.add_argument("--model", help="a .gguf file or a directory (default: the demo model)")
    options = parser.parse_args()
    model = options.model or str(demo_model_path())
    with tempfile.TemporaryDirectory() as scratch, served(model, Path(scratch) / "log") as url:
        write_task(Path(scratch))
        found = harness(options.lm_eval.absolute(), url, Path(scratch))
    return 0 if compare(found, LLM(model, max_model_len=256)) else 1


if __name__ == "__main__":
    sys.exit(main())
