"""Starts a model with random weights and draws two tokens: `python -m tokenspeed.bench.gpu.start_child MODEL FORMAT
DEVICE`. Prints the monotonic time at the end of each phase, as JSON."""

from __future__ import annotations

import json
import sys
import time

PROMPT = 128


def main(model: str, quantization: str, device: str) -> dict[str, float]:
    """Start and draw."""
    from tokenspeed.bench.gpu.setup import request
    from tokenspeed.engine.llm import LLM

    ended = {"imports": time.monotonic()}
    llm = LLM(model, load_format="dummy", device=device, quantization=None if quantization == "none" else quantization)
    ended |= llm.core.loaded_at
    ended["engine"] = time.monotonic()
    llm.core.add(request(llm, "first", PROMPT, 2))
    drawn = 0
    while drawn < 2:
        for update in llm.core.step():
            drawn += len(update.new_token_ids)
        if drawn:
            ended.setdefault("first_token", time.monotonic())
    ended["second_token"] = time.monotonic()
    llm.close()
    return ended


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
