"""What a fresh process needs to load the demo model and to decode: `python -m tokenspeed.bench.cpu_child 2 128`.

Arguments: threads, tokens. Prints one JSON object, all in seconds: imports_s (torch and the engine), load_s (the
constructor of `LLM`), first_token_s (of a prompt of two tokens, after that).
"""

from __future__ import annotations

import json
import sys
import time

from tokenspeed.contracts.sampling import SamplingParams

MAX_MODEL_LEN = 4096


def main(threads: int, tokens: int) -> None:
    """Load, decode, print."""
    start = time.perf_counter()
    from tokenspeed.engine.llm import LLM

    imported = time.perf_counter()
    llm = LLM(threads=threads, max_model_len=MAX_MODEL_LEN)
    loaded = time.perf_counter()
    params = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    (output,) = llm.generate(prompt_token_ids=[2, 818], sampling_params=params, use_tqdm=False)
    first = output.metrics.first_token_time or 0.0
    found = {"imports_s": imported - start, "load_s": loaded - imported}
    print(json.dumps(found | {"first_token_s": first - output.metrics.arrival_time}))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
