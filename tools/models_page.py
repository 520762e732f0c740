"""Writes docs/models.md from the registries of models and kernels: `python -m tools.models_page`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

from transformers import AutoConfig

from tests.parity_cases import CASES, Case
from tokenspeed.contracts.errors import UnsupportedError
from tokenspeed.formats.blocks import BLOCKS
from tokenspeed.kernels import ref
from tokenspeed.kernels.cpu import registration as cpu_registration
from tokenspeed.kernels.registry import Implementation, Registry, Situation
from tokenspeed.kernels.triton import attention_registration, dense, expert_registration
from tokenspeed.models.dense import Family
from tokenspeed.models.registry import CLASSIFIERS, FAMILIES, Definition, define_from_hf, shipped_configs
from tokenspeed.program.fuse import fuse
from tokenspeed.program.plan import plan
from tokenspeed.quantization.groups import GPU_MODES, MODES
from tokenspeed.runner.gpu.backend import HOST_REFERENCES
from tokenspeed.weights.packed_experts import STORED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "models.md"
HEAD = """\
# Models and formats

Made by `python -m tools.models_page` from `tokenspeed/models/` and the registries of kernels: change those, not this
page.

A model is found by `model_type` in its `config.json`, or by `general.architecture` in a GGUF file; what is not listed
is refused by name. [adding-a-model.md](adding-a-model.md) tells how to add a family.

## Families
tested: tiny random models of the family, every parameter drawn, agree with transformers in float32: logits, 32 greedy
tokens, in chunks, in batches and behind a cached prefix (`tests/models`); on the CPU through the C++ kernels as well.
runs: every op of the family has a kernel there, each of which is tested. no: the op that has none. GGUF files of
Mistral and Mixtral are of the architecture `llama`.

| family | `model_type` | GGUF | CPU | one NVIDIA GPU | classification head |
|---|---|---|---|---|---|
"""
FORMATS = """
Every model also runs by the torch reference, on any device that torch has (`--dtype float32`).

## Formats of weights in files
| format | GGUF | safetensors | CPU | one NVIDIA GPU |
|---|---|---|---|---|
"""
QUANTIZATION = """
GGUF files may be split, safetensors sharded.

## Quantised checkpoints
By the `quantization_config` of `config.json`; which modules are quantised is seen from the tensors. Values are those of
the file: on a GPU as they are, in a type of ours that holds them exactly, else unpacked to the compute dtype at load,
which takes its memory. Unpacked are also head and embeddings, experts but of fp8 and MXFP4, blocks of fp8 that parts of
a joined weight (q, k, v; gate, up) cut, and four-bit codes whose columns are no multiple of 128. On the CPU the torch
reference runs them, unpacked. Beside fp8 weights activations get an e4m3 scale per token, beside others they keep their
type, whatever the file says of them. The KV cache has the type of `--kv-cache-dtype`.

| `quant_method` | files | one NVIDIA GPU |
|---|---|---|
| `fp8` | e4m3 with a scale per 128 x 128 (`weight_scale_inv`) or per matrix | as it is |
| `compressed-tensors` | `float-quantized`: a scale per 128 x 128, channel or matrix | as it is |
| | 8 bits, `int-quantized` or `pack-quantized`: a scale per channel or matrix | as it is |
| | the same with zero points, or in groups | unpacked |
| | 4 bits, `pack-quantized`: groups of 32, 64, n x 128, or channels; zero points | as it is |
| | `nvfp4-pack-quantized` | unpacked |
| `gptq` | 4 bits, formats `gptq` and `gptq_v2`, columns in order; groups as above | as it is |
| | 8 bits | unpacked |
| `awq` | version `gemm`; groups as above | as it is |
| `modelopt` | `FP8` | as it is |
| | `NVFP4` | unpacked |
| `mxfp4` | gpt-oss's experts | as they are |

Refused by name: other methods, bits and packings, columns of a group that lie apart (act-order), sparsity, rotations,
`--quantization` beside them.

## `--quantization`, of bf16, fp16 and float32 weights at load
| mode | CPU | one NVIDIA GPU |
|---|---|---|
"""
SHIPPED = """
## Shipped configs
For benchmarks and floors, by name, with random weights (`--load-format dummy`): """
ON_GPU = {
    "fp8": "e4m3, a scale per output channel, activations per token; experts too",
    "int8": "a scale per output channel",
    "int4": "groups of 128 columns",
    "mxfp4": "e2m1, an exponent per 32 columns; experts too",
}
TOKENS = (1, 8, 64, 512)
"""Buckets that are asked for."""
SAFETENSORS = ("F32", "F16", "BF16")


def page() -> str:
    """The whole text."""
    families = "".join(_family(family) for family in FAMILIES)
    formats = "".join(_format(name) for name in BLOCKS)
    modes = "".join(_mode(name) for name in dict.fromkeys((*GPU_MODES, *MODES)))
    shipped = ", ".join(f"`{name}`" for name in sorted(shipped_configs()))
    return HEAD + families + FORMATS + formats + QUANTIZATION + modes + SHIPPED + shipped + ".\n"


def _family(family: Family) -> str:
    cases = [case for case in CASES.values() if case.model_type in family.hf_types]
    cpu = _verdict(_cpu, cases, "tested" if cases else "runs")
    gpu = _verdict(_gpu, cases, "runs")
    head = "yes" if family.name in CLASSIFIERS else "no"
    return f"| {family.name} | {_code(family.hf_types)} | {_code(family.gguf_types)} | {cpu} | {gpu} | {head} |\n"


def _verdict(registry: Callable[[], Registry], cases: Iterable[Case], good: str) -> str:
    """good, or what has no kernel in one of the cases."""
    device, dtype = ("cpu", "float32") if registry is _cpu else ("cuda", "bfloat16")
    missing = [found for case in cases if (found := _missing(_definition(case.name), registry(), device, dtype))]
    return f"no: {missing[0]}" if missing else good


def _missing(definition: Definition, registry: Registry, device: str, dtype: str) -> str | None:
    program = fuse(definition.program())
    formats = dict.fromkeys(definition.weights.specs, ("BF16",))
    try:
        for tokens in TOKENS:
            plan(program, registry, Situation(device, dtype, tokens, formats))
    except UnsupportedError as error:
        return str(error)
    return None


@cache
def _definition(name: str) -> Definition:
    case = CASES[name]
    return define_from_hf(AutoConfig.for_model(case.model_type, **case.settings).to_dict())


@cache
def _cpu() -> Registry:
    registry = Registry()
    cpu_registration.register(registry)
    return registry


@cache
def _gpu() -> Registry:
    """As the GPU's backend makes it, without the kernels that only some devices have."""
    registry = Registry()
    for room in (attention_registration, dense, expert_registration):
        room.register(registry)
    for op in ("select", "softcap"):
        registry.add(Implementation("torch", op, "gpu", lambda: None, lambda operands, situation: True, priority=10))
    ref.register(registry, but=HOST_REFERENCES)
    return registry


def _format(name: str) -> str:
    cpu = "as it is" if name in cpu_registration.FORMATS else "by the reference"
    gpu = {"BF16": "as it is", STORED: "experts as they are, else as bf16"}.get(name, "as bf16")
    return f"| {name} | yes | {'yes' if name in SAFETENSORS else 'no'} | {cpu} | {gpu} |\n"


def _mode(name: str) -> str:
    return f"| {name} | {MODES.get(name, 'by the reference')} | {ON_GPU[name]} |\n"


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def main() -> None:
    """Write the page."""
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
