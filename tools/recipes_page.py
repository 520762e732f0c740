"""Writes docs/recipes.md from the models' shapes and the ceilings of GPUs: `python -m tools.recipes_page`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tokenspeed.contracts.errors import ConfigError
from tokenspeed.quantization.narrow import EXPERT_MODES
from tokenspeed.sol.report import StepReport, find_definition, step_report

PAGE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"
CONTEXT = 8192
WITHIN_MS = 20.0
GPUS = ("H200", "H100")
MODELS = {
    "llama-3.2-1b": "meta-llama/Llama-3.2-1B-Instruct",
    "llama-3.1-8b": "meta-llama/Llama-3.1-8B-Instruct",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-30b-a3b": "Qwen/Qwen3-30B-A3B",
    "gpt-oss-20b": "openai/gpt-oss-20b",
}
"""Shipped configs, and the repository with such a model's weights."""
MODES = ("none", "fp8", "int8", "int4", "mxfp4")
HEAD = f"""\
# Model recipes

Made by `python -m tools.recipes_page` from the models' configs and what is known of the GPUs: change those, not this
page.

What a model takes, which flags to give, and below what time a token cannot come. Figures are computed as `tokenspeed
sol` does: nothing on this page was measured. [Benchmarks](benchmarks.md) has what was, each beside its floor.

- **weights**: bytes that the GPU holds, in GB of 10^9.
- **floor**: of one decode step of one sequence of {CONTEXT:,} tokens, in ms.
- **room for**: sequences of {CONTEXT:,} tokens, bf16 keys and values, in 0.9 of the memory beside the weights.
  Activations are not counted.
- **within {WITHIN_MS:g} ms**: so many of these decode together in steps whose floor is below that.
- The H100's memory and rates are its data sheet's, the H200's rates were measured; so the H100's floors are a little
  lower than any run can be.
- Formats that a row leaves out are refused for that model, by name.
"""
CPU = """
## On a CPU
A token reads every weight once, so its floor is bytes over bandwidth. Ask for your machine's:

    tokenspeed doctor --measure
    tokenspeed sol --batch 1 --context 1024
    tokenspeed sol llama-3.2-1b --quantization int8

Choose a GGUF file of 4 to 5 bits a weight, or `--quantization int4` of a bf16 checkpoint; all of the weights must fit
into memory, beside a quarter of what is then free for the KV cache.

## Another model, GPU or length

    tokenspeed sol qwen3-30b-a3b --gpu H200 --batch 32 --context 8192 --quantization fp8
    tokenspeed sol llama-3.1-8b --gpu B200 --context 32768 --within 10

The model may be a shipped config, a folder with a `config.json`, or a GGUF file.
"""


def page() -> str:
    """The whole text."""
    return HEAD + "".join(_model(name, repository) for name, repository in MODELS.items()) + CPU


def _model(name: str, repository: str) -> str:
    serve = f"    tokenspeed serve {repository}\n"
    head = f"| `--quantization` | GPU | weights | floor | room for | within {WITHIN_MS:g} ms |\n{'|---' * 6}|\n"
    return f"\n## {name}\n{serve}\n{head}" + "".join(f"{row}\n" for row in _rows(name))


def _rows(name: str) -> Iterator[str]:
    experts = any(spec.kind == "experts" for spec in find_definition(name)[1].weights.specs.values())
    for mode in ("none", *EXPERT_MODES) if experts else MODES:
        for gpu in GPUS:
            try:
                report = step_report(name, gpu, 1, CONTEXT, mode, within_ms=WITHIN_MS)
            except ConfigError:
                break
            yield _row(mode, gpu, report)


def _row(mode: str, gpu: str, report: StepReport) -> str:
    found = report.summary()
    given, held = "none" if mode == "none" else f"`{mode}`", found["held_weight_bytes"]
    if held > found["usable_bytes"]:
        return f"| {given} | {gpu} | {held / 1e9:.1f} GB | does not fit | | |"
    cells = (f"{found['floor_ms']:.2f} ms", f"{found['sequences']:,}", f"{found['sequences_within']:,}")
    return f"| {given} | {gpu} | {held / 1e9:.1f} GB | {' | '.join(cells)} |"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
