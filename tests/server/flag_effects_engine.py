"""What each flag of the engine does to a tiny model; a function per flag, in EFFECTS."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.engine.async_tools import write_byte_tokenizer
from tests.seeds import SEED
from tests.server.flag_house import House, drive, post
from tests.tiny_llama import CONTEXT, VOCAB, write_tiny
from tokenspeed.cli.main import main
from tokenspeed.contracts.errors import ConfigError, ModelNotFoundError, PromptError, UnsupportedError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.core import EngineCore
from tokenspeed.engine.intake import Intake, open_tokenizer
from tokenspeed.runner.build import open_model
from tokenspeed.runner.model import compute_device
from tokenspeed.runner.room import CardUse, share_of_card

GB = 10**9
GREEDY = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)


def prompt(length: int, number: int = 0) -> list[int]:
    rng = random.Random(SEED + number)
    return [rng.randrange(VOCAB) for _ in range(length)]


def model(house: House) -> None:
    for flags in ([str(house.tiny)], ["--model", str(house.tiny)], [str(house.tiny), "--model", str(house.tiny)]):
        assert open_model(house.config(*flags).engine).definition.config.vocab_size == VOCAB
    with pytest.raises(ModelNotFoundError, match="no model at"):
        open_model(house.config("--model", str(house.tmp / "nowhere")).engine)


def fetched(house: House, *flags: str) -> dict[str, Any]:
    """What the hub's client is asked for."""
    asked: dict[str, Any] = {}

    def snapshot_download(repo: str, **settings: Any) -> str:
        asked.update(settings, repo=repo)
        return str(house.tiny)

    house.patch.chdir(house.tmp)
    house.patch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    open_model(house.config("org/name", *flags).engine)
    return asked


def revision(house: House) -> None:
    assert fetched(house, "--revision", "v2")["revision"] == "v2"
    assert fetched(house)["revision"] is None


def download_dir(house: House) -> None:
    assert fetched(house, "--download-dir", "/models")["cache_dir"] == "/models"
    assert fetched(house)["cache_dir"] is None


def tokenizer(house: House) -> None:
    def opened(*flags: str) -> Any:
        info = house.core(*flags).info
        return None if info.path is None or info.format is None else open_tokenizer(info.path, info.format, info.model)

    assert opened() is None
    folder = house.tmp / "words"
    folder.mkdir()
    found = opened("--tokenizer", str(write_byte_tokenizer(folder)))
    assert found.decode(found.encode("as said", add_special_tokens=False)) == "as said"
    for nothing in (house.tiny, house.tmp / "nowhere"):
        with pytest.raises(ModelNotFoundError, match=str(nothing)):
            house.core("--tokenizer", str(nothing))


def trust_remote_code(house: House) -> None:
    with pytest.raises(ConfigError, match="--trust-remote-code is refused: this engine runs no code of a repository"):
        house.config("--trust-remote-code")
    assert main(["serve", str(house.tiny), "--trust-remote-code"]) == 1
    drive(house.core("--no-trust-remote-code"), prompt(3))


def generation_config(house: House) -> None:
    folder = house.tmp / "stated"
    folder.mkdir()
    write_tiny(folder, SEED, {"temperature": 0.25, "top_k": 7, "eos_token_id": [3, 5]})
    stated, left_out = (
        house.core("--model", str(folder), *flags).info for flags in ([], ["--generation-config", "none"])
    )
    assert dict(stated.sampling_defaults) == {"temperature": 0.25, "top_k": 7}
    assert dict(left_out.sampling_defaults) == {}
    assert stated.eos_token_ids == left_out.eos_token_ids == [3, 5]


def chat_template(house: House) -> None:
    asked = post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert house.statuses([], asked) == [400]
    (answer,) = house.talk(["--chat-template", "{{ messages[0].content }}!"], asked)
    assert answer.json()["choices"][0]["message"]["content"] == "HI!", "the fake shouts the prompt"


def device(house: House) -> None:
    for is_there in (False, True):
        house.patch.setattr(torch.cuda, "is_available", lambda found=is_there: found)
        assert compute_device(house.config("--device", "cpu").engine).type == "cpu"
        assert compute_device(house.config().engine).type == ("cuda" if is_there else "cpu")
    assert compute_device(house.config("--device", "cuda").engine).type == "cuda"


def dtype(house: House) -> None:
    for name in ("float32", "bfloat16"):
        core = house.core("--dtype", name)
        assert core.model.dtype == getattr(torch, name)
        drive(core, prompt(5))


def kv_cache_dtype(house: House) -> None:
    for name in ("float32", "int8"):
        core = house.core("--kv-cache-dtype", name)
        assert core.kv_dtype == getattr(torch, name)
        drive(core, prompt(5))


def quantization(house: House) -> None:
    whole, int8, int4 = (
        sum(weight.nbytes for weight in house.core(*flags).model.packed.values())
        for flags in ([], ["--quantization", "int8"], ["--quantization", "int4"])
    )
    assert whole > int8 > int4


def precise(house: House) -> None:
    for flags, expected in ((["--precise"], torch.float32), ([], torch.bfloat16)):
        core = house.core("--model", str(house.quantised()), *flags)
        assert (core.model.dtype, core.kv_dtype, core.backend.name) == (expected, expected, "cpu")


def batch_invariant(house: House) -> None:
    fast = ["--model", str(house.quantised())]
    drive(house.core(*fast, "--batch-invariant"), prompt(5))
    drive(house.core(*fast, "--dtype", "float32"), prompt(5))
    with pytest.raises(UnsupportedError, match="--batch-invariant"):
        house.core(*fast, "--batch-invariant", "--dtype", "float32")


def packed_cache(house: House) -> None:
    folder, fast = house.tmp / "packed", ["--model", str(house.quantised())]
    tokens = [drive(house.core(*fast, "--packed-cache", str(folder)), prompt(5)).tokens for _ in range(2)]
    assert [path.suffix for path in folder.iterdir()] == [".packed"]
    assert tokens[0] == tokens[1] == drive(house.core(*fast), prompt(5)).tokens


def load_format(house: House) -> None:
    folder = house.tmp / "bare"
    folder.mkdir()
    write_tiny(folder, SEED)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError):
        house.core("--model", str(folder))
    assert len(drive(house.core("--model", str(folder), "--load-format", "dummy"), prompt(5)).tokens[0]) == 3


def threads(house: House) -> None:
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            house.core("--dtype", "float32", "--threads", str(count))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(before)


def lm_head(house: House) -> None:
    read = {}
    for name in ("screened", "full"):
        core = house.core("--model", str(house.quantised()), "--lm-head", name)
        drive(core, prompt(5), max_tokens=9)
        read[name] = core.backend.weight_bytes["lm_head"] / core.model.packed["lm_head"].nbytes
    assert read["full"] == 1 != read["screened"]


def max_model_len(house: House) -> None:
    core = house.core("--max-model-len", "20")
    assert len(drive(core, prompt(15), max_tokens=99).tokens[0]) == 5
    with pytest.raises(PromptError, match="max_model_len 20"):
        drive(core, prompt(20))
    assert house.core().info.max_model_len == CONTEXT


def max_num_seqs(house: House) -> None:
    prompts = [prompt(4, number) for number in range(5)]
    assert drive(house.core("--max-num-seqs", "2"), *prompts).most_running == 2
    assert drive(house.core(), *prompts).most_running == 5


def max_num_batched_tokens(house: House) -> None:
    assert drive(house.core("--max-num-batched-tokens", "7"), prompt(30)).largest_step == 7
    assert drive(house.core(), prompt(30)).largest_step == 30


def cached(core: EngineCore) -> int:
    """Tokens of a prompt of 30 that its second run takes from the cache."""
    drive(core, prompt(30))
    return drive(core, prompt(30)).cached[0]


def block_size(house: House) -> None:
    assert [cached(house.core("--block-size", size)) for size in ("4", "16")] == [28, 16]


def enable_prefix_caching(house: House) -> None:
    assert cached(house.core("--no-enable-prefix-caching")) == 0
    assert cached(house.core("--enable-prefix-caching")) == cached(house.core()) == 16


def kv_cache_memory_bytes(house: House) -> None:
    for size in (1 << 15, 1 << 17):
        core = house.core("--kv-cache-memory-bytes", str(size))
        assert core.info.num_pages == size // core.page_shape.page_bytes


def gpu_memory_utilization(house: House) -> None:
    use = CardUse(total=100 * GB, free_at_start=99 * GB, free=89 * GB)
    for share in (0.5, 0.75):
        config = house.config("--gpu-memory-utilization", str(share)).engine
        assert share_of_card(use, config).cache_bytes == int(share * 100 * GB) - 10 * GB


def target_itl_ms(house: House) -> None:
    def beside(*flags: str) -> int:
        """Tokens of a step in which 40 of a prompt might be fed beside one that decodes, where steps are slow."""
        core = house.core("--block-size", "4", *flags)
        request = Intake(core.info, None, 0).request
        core.add(request("a", prompt(3), GREEDY, priority=0, cache_salt=""))
        core.step()
        for _ in range(500):
            core.scheduler.observe(10, 2.0)
        core.add(request("b", prompt(40, 1), GREEDY, priority=0, cache_salt=""))
        assert core.scheduler.schedule() is not None
        return core.scheduler.record.num_tokens

    assert beside("--target-itl-ms", "1000") < 10 < beside()


def seed(house: House) -> None:
    def drawn(*flags: str) -> list[int]:
        config = house.config(*flags).engine
        intake = Intake(house.core().info, None, config.seed)
        return [intake.request(str(at), [1], GREEDY, 0, "").seed for at in range(3)]

    assert drawn("--seed", "5") == drawn("--seed", "5")
    assert len({*drawn("--seed", "5"), *drawn("--seed", "6"), *drawn(), *drawn()}) == 12


def make_quantised(folder: Path) -> Path:
    from tests.parity_tools import CASES, make_gguf

    return make_gguf(CASES["llama"], "Q8_0", folder / "model.gguf").path


EFFECTS: dict[str, Callable[[House], None]] = {
    "--model": model,
    "--revision": revision,
    "--tokenizer": tokenizer,
    "--download-dir": download_dir,
    "--trust-remote-code": trust_remote_code,
    "--generation-config": generation_config,
    "--chat-template": chat_template,
    "--device": device,
    "--dtype": dtype,
    "--kv-cache-dtype": kv_cache_dtype,
    "--quantization": quantization,
    "--precise": precise,
    "--batch-invariant": batch_invariant,
    "--packed-cache": packed_cache,
    "--load-format": load_format,
    "--threads": threads,
    "--lm-head": lm_head,
    "--max-model-len": max_model_len,
    "--max-num-seqs": max_num_seqs,
    "--max-num-batched-tokens": max_num_batched_tokens,
    "--block-size": block_size,
    "--kv-cache-memory-bytes": kv_cache_memory_bytes,
    "--gpu-memory-utilization": gpu_memory_utilization,
    "--enable-prefix-caching": enable_prefix_caching,
    "--target-itl-ms": target_itl_ms,
    "--seed": seed,
}
