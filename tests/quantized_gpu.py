"""Runs a tiny checkpoint of every quantised layout on this machine's GPU against transformers with the values that it
stands for:

    python -m tests.quantized_gpu [NAME ...]

Prints of each which weights stay narrow and the largest error of the log-probabilities that the engine gives its own
tokens, for prompts of one, some, and many tokens. Status 1 where one is too large, and larger than transformers' own in
bf16: random experts multiply rounding (0.2 to 0.3 at 300 tokens). Without a GPU the reference runs.
"""

from __future__ import annotations

import sys
import tempfile
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

from tests.parity_cases import VOCAB
from tests.parity_tools import CASES, oracle_logits, random_prompt
from tests.quantized_files import METHODS, Quantized, make_mxfp4, make_quantized
from tests.seeds import SEED
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.llm import LLM
from tokenspeed.quantization.narrow import NarrowWeight

WIDE = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "head_dim": 128}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 1024}
LENGTHS, TOKENS = (1, 40, 300), 4
BOUND, FP8_BOUND = 0.1, 0.4


def made(name: str, folder: Path) -> Quantized:
    """A dense model, of names that begin with moe- one with experts, of mxfp4 gpt-oss. Experts are all chosen: by
    rounded scores others may be."""
    if name == "mxfp4":
        case = CASES["gpt_oss"]
        more = {"max_position_embeddings": 1024, "num_experts_per_tok": case.settings["num_local_experts"]}
        return make_mxfp4(replace(case, settings=case.settings | more), folder, SEED)
    moe = {"moe_intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 4}
    family, more = ("qwen3_moe", moe) if name.startswith("moe-") else ("qwen3-tied", {})
    case = CASES[family]
    case = replace(case, settings=case.settings | WIDE | more)
    return make_quantized(case, METHODS[name.removeprefix("moe-")], folder, SEED)


def errors(llm: LLM, quantized: Quantized, length: int) -> tuple[float, float]:
    """The largest one of what is said of the tokens and their next best, teacher-forced; that of the oracle in bf16."""
    prompt = [token % VOCAB for token in random_prompt(length, SEED + length)]
    asked = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=3, ignore_eos=True)
    found = llm.generate(prompt_token_ids=prompt, sampling_params=asked, use_tqdm=False)[0].outputs[0]
    fed = [*prompt, *found.token_ids[:-1]]
    wanted, rounded = (
        oracle_logits(each, fed).float().log_softmax(-1)[-TOKENS:]
        for each in (quantized.oracle, deepcopy(quantized.oracle).bfloat16())
    )
    assert found.logprobs is not None
    said = [(i, token, entry.logprob) for i, entries in enumerate(found.logprobs) for token, entry in entries.items()]
    own, others = (
        max(abs(value - float(wanted[i, token])) for i, token, value in given)
        for given in (said, [(i, token, float(rounded[i, token])) for i, token, _ in said])
    )
    return own, others


def main() -> int:
    """All layouts, or those that are named."""
    good = True
    for name in sys.argv[1:] or [*METHODS, "moe-fp8-block", "moe-ct-fp8-channel", "moe-gptq", "mxfp4"]:
        with tempfile.TemporaryDirectory() as folder:
            quantized = made(name, Path(folder))
            llm = LLM(folder, max_model_len=512, max_num_seqs=4)
            weights = getattr(llm.core.backend, "weights", {})
            narrow = sum(isinstance(weight, NarrowWeight) for weight in weights.values())
            found = [errors(llm, quantized, length) for length in LENGTHS]
            bound = FP8_BOUND if "fp8" in name else BOUND
            fits = all(own < max(bound, others) for own, others in found)
            good &= fits
            shown = " ".join(f"{own:.4f} ({others:.4f})" for own, others in found)
            print(
                f"{'' if fits else 'WRONG '}{name}: {llm.core.backend.name}, {narrow} narrow, off by {shown}",
                flush=True,
            )
            del llm
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
