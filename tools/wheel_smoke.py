"""Does an installed TokenSpeed work? Run anywhere but in a checkout: `python tools/wheel_smoke.py`."""

from __future__ import annotations

import platform
import subprocess
import sys
from pathlib import Path

import tokenspeed
from tokenspeed.kernels.cpu.registration import extension_available

CHECKOUT = Path(__file__).resolve().parents[1]
PROMPT = [2, 3, 5, 7, 11]


def main() -> None:
    """Raises AssertionError where something is amiss."""
    package = Path(tokenspeed.__file__).resolve().parent
    assert package.parent != CHECKOUT, f"this is the checkout's own package: {package}"
    assert not (package / "kernels" / "cpu" / "src").exists(), "the wheel holds sources of the kernels"
    assert extension_available(), "the C++ extension does not load"
    command = [sys.executable, "-m", "tokenspeed.cli.main", "--version"]
    assert tokenspeed.__version__ in subprocess.run(command, capture_output=True, text=True, check=True).stdout
    llm = tokenspeed.LLM("gemma-3-270m", load_format="dummy", max_model_len=64, seed=0)
    params = tokenspeed.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    tokens = [
        llm.generate(prompt_token_ids=[PROMPT], sampling_params=params, use_tqdm=False)[0].outputs[0].token_ids
        for _ in range(2)
    ]
    assert len(tokens[0]) == 8
    assert tokens[0] == tokens[1], tokens
    print(f"tokenspeed {tokenspeed.__version__} works: {platform.machine()}, Python {platform.python_version()}")


if __name__ == "__main__":
    main()
