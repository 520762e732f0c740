"""The commands that the documentation shows, and what becomes of each in the tests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/*.md")
PYTHON = "python"
"""The kind of a block of Python."""
SHELLS = ("", "sh", "bash", "console")
PROGRAM = r"(?:[A-Z_]+=\S+ )?(?:\.venv/bin/)?(?:tokenspeed|python3?|make|pip|curl|cmake|docker|pre-commit|numactl|git)"
INLINE = re.compile(rf"`((?:{PROGRAM}|build/\S+) [^`\n]+)`")


@dataclass(frozen=True)
class Shown:
    """A command, or a block of Python, as a page has it: lines that a backslash or a here-document joins are one."""

    page: str
    text: str
    kind: str = "command"


@dataclass(frozen=True)
class Rule:
    """What becomes of commands that the pattern matches whole. how: "run", "serve" (until it is ready), "load" (on a
    server, with less to do), "help" (a command's name alone), or "elsewhere" and "not", with a test's path or a
    reason."""

    pattern: str
    how: str
    why: str = ""

    def fits(self, text: str) -> bool:
        return re.fullmatch(self.pattern, text, re.DOTALL) is not None


TOKENSPEED = r"(?:\.venv/bin/)?tokenspeed "
GPU = "needs a GPU"
LONG = "minutes on a machine that does nothing else, and writes published records; its parts are tested in tests/bench"
RULES = (
    Rule(r"tokenspeed (?:bench )?[a-z-]+", "help"),
    Rule(r"python -m tokenspeed\.bench COMMAND --help", "not", "COMMAND stands for any: tests/bench runs them"),
    Rule(TOKENSPEED + r"serve (?:Qwen|meta-llama|openai|org)/\S+.*", "not", "fetches a repository of the hub"),
    Rule(r"(?:CUDA_VISIBLE_DEVICES=\d )?" + TOKENSPEED + "serve .*", "serve"),
    Rule(r"numactl .*", "not", "needs two sockets"),
    Rule(TOKENSPEED + "bench serve .*", "load"),
    Rule(TOKENSPEED + "bench compare .*", "not", "starts other engines for minutes; tests/bench compares stubs"),
    Rule(TOKENSPEED + "bench report .*", "elsewhere", "tests/e2e/test_newcomer.py"),
    Rule(TOKENSPEED + "bench perplexity .*", "run"),
    Rule(TOKENSPEED + "verify .*cuda.*", "not", GPU),
    Rule(TOKENSPEED + "verify .*", "run"),
    Rule(TOKENSPEED + r"plan MODEL --measured", "run"),
    Rule(TOKENSPEED + r"plan (?:llama-3\.1-8b|.*--quantization fp8) .*--measured.*", "not", GPU),
    Rule(TOKENSPEED + r"(?:sol|doctor|generate|plan|--help)\b.*", "run"),
    Rule(r"cat > in\.jsonl .*", "elsewhere", "tests/cli/test_run_batch.py"),
    Rule(TOKENSPEED + r"run-batch .*", "elsewhere", "tests/cli/test_run_batch.py"),
    Rule(r"curl .*", "elsewhere", "tests/server/test_curl_lines.py"),
    Rule(r"make demo\b.*", "elsewhere", "tests/e2e/test_newcomer.py"),
    Rule(r"make docs\b.*", "elsewhere", "tests/house/test_site.py"),
    Rule(r"make (?:test|test-full|lint|format)\b.*", "not", "is, or holds, the run that would run it"),
    Rule(r"make bench-cpu.*", "not", LONG),
    Rule(r"\.venv/bin/(?:python -m pytest|pre-commit) .*", "not", "tests within tests; a hook of a checkout"),
    Rule(r"pip install .*tokenspeed-X.*", "elsewhere", "tests/house/test_release.py"),
    Rule(r"pip install '\.\[gpu\]'", "not", GPU),
    Rule(r"pip install .*", "elsewhere", "tests/e2e/test_newcomer.py"),
    Rule(r"docker .*", "not", "needs docker's daemon and a registry of images"),
    Rule(r"(?:lm_eval|python -m tools\.lm_eval_check) .*", "not", "needs lm-evaluation-harness in a place of its own"),
    Rule(r"python -m tools\.\w+", "elsewhere", "tests/house/test_site.py"),
    Rule(r"python -m build .*", "elsewhere", "tests/house/test_release.py"),
    Rule(r"python -m tokenspeed\.bench\.(?:host|simulate|table)", "run"),
    Rule(
        r"python -m tokenspeed\.bench\.(?:client_error|cpu|cpu_hf|guidellm|serving_overhead|server_peer|soak)\b.*",
        "not",
        LONG,
    ),
    Rule(r"(?:PYTHONPATH=\. )?python3? -m tokenspeed\.bench(?: |\.gpu).*", "not", GPU),
    Rule(r"(?:cmake|build/native/plain/native_kernels) .*", "elsewhere", "tests/kernels/native_build.py"),
)
"""The first that fits holds."""
SNIPPETS = {
    "docs/adding-a-model.md": "tests/house/test_docs.py",
    "docs/offline-batches.md": "tests/cli/test_run_batch.py",
}
"""Pages whose Python other tests look at; that of the others is run."""


def shown() -> list[Shown]:
    """Everything, page by page."""
    pages = [path for name in PAGES for path in sorted(ROOT.glob(name))]
    return [each for path in pages for each in commands(path.read_text(), str(path.relative_to(ROOT)))]


def rule_of(text: str) -> Rule | None:
    """The rule that holds for a command."""
    return next((rule for rule in RULES if rule.fits(text)), None)


def commands(text: str, page: str) -> Iterator[Shown]:
    """Those of a page's blocks, then those within its lines."""
    rest: list[str] = []
    for language, block in _blocks(text, rest):
        if language == PYTHON or (language == "" and re.match(r"(?:from|import) \w", block)):
            yield Shown(page, block, PYTHON)
        elif language in SHELLS:
            yield from (Shown(page, line) for line in _lines(block))
    yield from (Shown(page, found) for found in INLINE.findall("\n".join(rest)))


def _blocks(text: str, rest: list[str]) -> Iterator[tuple[str, str]]:
    """Language and text of fenced and indented blocks; all other lines go to `rest`."""
    lines = text.split("\n")
    at = 0
    while at < len(lines):
        line = lines[at]
        if line.startswith("```"):
            end = next(i for i in range(at + 1, len(lines)) if lines[i].startswith("```"))
            yield line[3:].strip() or "text", "\n".join(lines[at + 1 : end])
        elif line.startswith("    ") and (not at or not lines[at - 1].strip() or lines[at - 1].startswith("#")):
            end = at
            while end + 1 < len(lines) and (lines[end + 1].startswith("    ") or not lines[end + 1].strip()):
                end += 1
            yield "", "\n".join(each[4:] for each in lines[at : end + 1]).strip("\n")
        else:
            rest.append(line)
            end = at
        at = end + 1


def _lines(block: str) -> Iterator[str]:
    """Commands of a block, without remarks behind them."""
    joined = re.sub(r"\\\n\s*", "", block)
    marked = re.sub(r"(<<'(\w+)'\n.*?\n\2)$", lambda found: found[1].replace("\n", "\0"), joined, flags=re.S | re.M)
    for line in marked.split("\n"):
        if line.strip() and not line.startswith("#"):
            yield re.sub(r"\s{2,}#.*", "", line.removeprefix("$ ")).replace("\0", "\n")
