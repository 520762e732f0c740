"""Quantised checkpoints end to end on the reference: logits are those of transformers on the values they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.parity_cases import ROUTING_MARGIN
from tests.parity_tools import CASES, Walker, load, oracle_logits, random_prompt, routing_margin
from tests.quantized_files import METHODS, Quantized, make_mxfp4, make_quantized, write_config
from tests.seeds import SEED
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import ConfigError, FormatError, UnsupportedError, WeightError
from tokenspeed.engine.llm import LLM
from tokenspeed.runner.build import open_model
from tokenspeed.runner.model import load_model
from tokenspeed.sol.plan_table import plan_table
from tokenspeed.sol.report import step_report

WIDE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "head_dim": 32}
WIDE |= {"num_attention_heads": 4, "num_key_value_heads": 2}
ODD = WIDE | {"intermediate_size": 160}
BOUND = 2e-4
Maker = Callable[..., Quantized]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Maker:
    """made(name of a method, family, settings): a checkpoint, made once."""
    kept: dict[str, Quantized] = {}

    def make(name: str, family: str = "llama", settings: dict[str, Any] = WIDE) -> Quantized:
        key = f"{name} {family} {settings}"
        if key not in kept:
            case = CASES[family]
            case = replace(case, settings=case.settings | settings)
            folder = tmp_path_factory.mktemp("quantized")
            # Of experts, choices must be clear.
            kept[key] = make_quantized(case, METHODS[name], folder, case.seed if "moe" in family else SEED)
        return kept[key]

    return make


@pytest.fixture
def copied(made: Maker, tmp_path: Path) -> Callable[..., Path]:
    """A copy of a checkpoint, to be changed."""

    def copy(name: str, **config: Any) -> Path:
        original = made(name).path
        for file in ("config.json", "model.safetensors"):
            (tmp_path / file).write_bytes((original / file).read_bytes())
        if config:
            given = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
            write_config(tmp_path, quantization_config=given | config)
        return tmp_path

    return copy


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


FIRST = ("fp8-block", "fp8-tensor", "ct-fp8-channel", "ct-int8-zeros", "ct-int4-zeros", "ct-nvfp4", "gptq-zeros", "awq")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FIRST else pytest.mark.slow) for name in METHODS]
)
def test_logits(made: Maker, name: str) -> None:
    quantized = made(name)
    prompt = random_prompt(21, SEED)
    logits = Walker(load(quantized.path)).logits(prompt)
    assert (logits - oracle_logits(quantized.oracle, prompt)).abs().max() < BOUND


@pytest.mark.parametrize(
    "name, family, settings",
    [
        ("ct-int8-channel", "qwen3-tied", ODD),
        ("fp8-block", "qwen2", ODD),
        ("gptq-row", "qwen2", ODD),
        ("fp8-tensor", "qwen3-tied", ODD),
        ("ct-int4-32", "gemma3", {}),
        ("ct-fp8-channel", "glm4", {}),
        ("fp8-block", "glm4", {"head_dim": 64}),
    ],
)
def test_logits_of_families_with_odd_widths(made: Maker, name: str, family: str, settings: dict[str, Any]) -> None:
    """Heads tied and not, biases, blocks and groups cut short, rows of q and k by turns."""
    quantized = made(name, family, settings)
    prompt = random_prompt(21, SEED)
    logits = Walker(load(quantized.path)).logits(prompt)
    assert (logits - oracle_logits(quantized.oracle, prompt)).abs().max() < BOUND


@pytest.mark.parametrize("name", ["gpt_oss", "gpt_oss-limit"])
def test_experts_in_mxfp4(name: str, tmp_path: Path) -> None:
    """Gate and up rows by turns, biases, the router and attention in bf16."""
    seed = CASES[name].seed
    quantized, prompt = make_mxfp4(CASES[name], tmp_path, seed), random_prompt(21, seed)
    assert routing_margin(quantized.oracle, prompt) > ROUTING_MARGIN, "choose another seed"
    model = load(quantized.path)
    sizes = {key: size for key, size in model.file_bytes.items() if "experts_" in key and "bias" not in key}
    assert sum(sizes.values()) == sum(values.size for values in quantized.values.values()) * 17 / 32
    logits = Walker(model).logits(prompt)
    assert (logits - oracle_logits(quantized.oracle, prompt)).abs().max() < BOUND
    report = step_report(str(tmp_path), "H200", 1, 64, "none")
    assert report.total.cost.weight_bytes < sum(model.file_bytes.values())


@pytest.mark.parametrize("name", ["fp8-block", "gptq-row"])
def test_experts_of_each_their_own_tensors(made: Maker, name: str) -> None:
    """Widths that are no multiples of blocks."""
    quantized, prompt = made(name, "qwen3_moe", {}), random_prompt(21, CASES["qwen3_moe"].seed)
    assert routing_margin(quantized.oracle, prompt) > ROUTING_MARGIN, "choose another seed"
    logits = Walker(load(quantized.path)).logits(prompt)
    assert (logits - oracle_logits(quantized.oracle, prompt)).abs().max() < BOUND


@pytest.mark.parametrize("name", ["fp8-block", "gptq"])
def test_an_engine_runs_them_by_the_reference_and_says_so(
    made: Maker, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(str(made(name).path), max_model_len=64)
    assert llm.core.backend.name == "ref"
    kind = {"fp8-block": "F8_E4M3", "gptq": "GPTQ_4"}[name]
    assert f"the slow reference runs this model; no fast kernel for: linear, weights in {kind}" in caplog.text
    assert llm.generate(prompt_token_ids=random_prompt(5, SEED), use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize("name", ["fp8-block", "ct-int4-zeros", "gptq", "awq", "ct-nvfp4"])
def test_bytes_are_what_the_files_take(made: Maker, name: str) -> None:
    """Of the floors, with tensors and, but for types of scales that differ, by the config alone."""
    path = made(name).path
    tensors = load_file(path / "model.safetensors")
    wanted = {
        parts: sum(t.nbytes for key, t in tensors.items() if any(f"layers.0.{part}." in key for part in parts))
        for parts in (("mlp.gate_proj", "mlp.up_proj"), ("self_attn.o_proj",))
    }
    loaded = load(path)
    assert [loaded.file_bytes["layers.0.gate_up"], loaded.file_bytes["layers.0.o"]] == list(wanted.values())
    report, table = (of(str(path), "H200", 1, 64, "none") for of in (step_report, plan_table))
    assert report.total.cost.bytes == pytest.approx(table.total.cost.bytes)
    read = {name: size for name, size in loaded.file_bytes.items() if name != "embed"}
    row = loaded.file_bytes["embed"] / loaded.definition.config.vocab_size
    # Vectors are counted as float32, which they are loaded as.
    vectors = [name for name, weight in loaded.packed.items() if weight.spec.kind == "vector"]
    expected = sum(read.values()) - sum(read[name] for name in vectors) / 2 + row
    assert report.total.cost.weight_bytes == pytest.approx(expected)


@pytest.mark.parametrize("name", ["fp8-block", "ct-fp8-channel", "modelopt-fp8", "gptq"])
def test_floors_know_of_products_in_fp8(made: Maker, name: str) -> None:
    """Of so many rows that operations bind."""
    path = str(made(name).path)
    flops = step_report(path, "H200", 100000, 1, "none").by_op["linear"]
    rate = flops.cost.flops / flops.seconds / 1e12
    assert flops.bound == "compute"
    assert (rate > 800) == (name != "gptq")


@pytest.mark.parametrize("name", ["modelopt-fp8", "modelopt-nvfp4"])
def test_settings_beside_the_config(copied: Callable[..., Path], name: str) -> None:
    """Where older checkpoints of Model Optimizer have them."""
    path, settings = copied(name), METHODS[name].config
    given = settings.get("quantization", {key: settings[key] for key in settings if key != "quant_method"})
    beside = {"producer": {"name": "modelopt"}, "quantization": given | {"kv_cache_quant_algo": None}}
    formats = load(path).formats
    write_config(path, quantization_config=None)
    with pytest.raises((UnsupportedError, WeightError)):
        load(path)
    (path / "hf_quant_config.json").write_text(json.dumps(beside))
    assert load(path).formats == formats
    assert step_report(str(path), "H200", 1, 8, "none").total.cost.weight_bytes > 0


def test_floors_of_a_config_alone(made: Maker, tmp_path: Path) -> None:
    path = made("fp8-block").path
    (tmp_path / "config.json").write_bytes((path / "config.json").read_bytes())
    whole, alone = (step_report(str(each), "H200", 1, 64, "none") for each in (path, tmp_path))
    assert alone.total.cost.weight_bytes == pytest.approx(whole.total.cost.weight_bytes, rel=0.01)


def test_prefix_keys_tell_layouts_apart(copied: Callable[..., Path]) -> None:
    """The same tensors, read in two ways."""
    path = copied("gptq-v2")
    roots = set()
    for form in ("gptq", "gptq_v2"):
        given = json.loads((path / "config.json").read_text())["quantization_config"]
        write_config(path, quantization_config=given | {"checkpoint_format": form})
        edit(path, lambda tensors: [t.bitwise_and_(0x77777777) for key, t in tensors.items() if key.endswith("qzeros")])
        roots.add(LLM(str(path), max_model_len=64).core.cache._root)
    assert len(roots) == 2


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("fp8-block", {"quant_method": "bitsandbytes"}, "'bitsandbytes' is not supported .*fp8.*gptq"),
        ("fp8-block", {"weight_block_size": [64, 128]}, r"weight_block_size \[64, 128\].*\[128, 128\]"),
        ("fp8-block", {"fmt": "e5m2"}, "fmt 'e5m2'"),
        ("fp8-block", {"activation_scheme": "block"}, "activation_scheme 'block'"),
        ("gptq", {"bits": 3}, "bits 3 is not supported"),
        ("gptq", {"checkpoint_format": "marlin"}, "checkpoint_format 'marlin'"),
        ("gptq", {"group_size": 0}, "group_size 0"),
        ("gptq", {"group_size": 96}, r"q_proj.weight: .*groups of 96 do not divide 128"),
        ("gptq", {"dynamic": {r"+:.*down": {"bits": 8}}}, r"dynamic '\+:\.\*down'"),
        ("awq", {"version": "gemv"}, "version 'gemv'"),
        ("awq", {"zero_point": False}, "zero_point False"),
        ("awq", {"bits": 8}, "bits 8"),
        ("ct-int4-128", {"format": "marlin-24"}, "format 'marlin-24'"),
        ("ct-int4-128", {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config 'sparse-24-bitmask'"),
        ("ct-int4-128", {"transform_config": {"config_groups": {"a": 1}}}, "transform_config"),
        ("ct-int4-128", {"quantization_status": "calibration"}, "quantization_status 'calibration'"),
        ("modelopt-fp8", {"quant_algo": "W4A8_AWQ"}, "quant_algo 'W4A8_AWQ'"),
    ],
)
def test_settings_that_are_not_read_are_refused_by_name(
    copied: Callable[..., Path], name: str, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        load(copied(name, **change))


@pytest.mark.parametrize(
    "weights, message",
    [
        ({"num_bits": 2}, "num_bits 2"),
        ({"type": "codebook"}, "type 'codebook'"),
        ({"strategy": "token"}, "strategy 'token'"),
        ({"actorder": "hessian"}, "actorder 'hessian'"),
    ],
)
def test_schemes_of_compressed_tensors_that_are_not_read(
    copied: Callable[..., Path], weights: dict[str, Any], message: str
) -> None:
    config = METHODS["ct-int4-128"].config
    group = config["config_groups"]["group_0"]
    changed = group | {"weights": group["weights"] | weights}
    with pytest.raises(UnsupportedError, match=message):
        load(copied("ct-int4-128", config_groups={"group_0": changed}))


@pytest.mark.parametrize(
    "name, change",
    [
        ("gptq", {"group_size": "many"}),
        ("gptq", {"dynamic": ["-:a"]}),
        ("gptq", {"dynamic": {"-:(": {}}}),
        ("ct-int4-128", {"config_groups": {}}),
        ("ct-int4-128", {"ignore": "lm_head"}),
        ("ct-int4-128", {"ignore": ["re:("]}),
        ("fp8-block", {"modules_to_not_convert": [""]}),
    ],
)
def test_settings_that_make_no_sense(copied: Callable[..., Path], name: str, change: dict[str, Any]) -> None:
    with pytest.raises(FormatError, match=f"quantization_config.*{next(iter(change))}|an empty name|pattern"):
        load(copied(name, **change))


def test_tensors_that_do_not_fit_are_named(copied: Callable[..., Path]) -> None:
    base = "model.layers.1.mlp.up_proj."
    path = copied("gptq")
    scales = load_file(path / "model.safetensors")[base + "scales"]
    for change, error, message in (
        (scales[:, :8].clone(), WeightError, r"up_proj.scales' \[1, 8\] instead of \[1, 256\]"),
        (scales.double(), UnsupportedError, r"up_proj.scales' of type F64 \(wanted: F16 or BF16 or F32\)"),
    ):
        edit(path, partial(dict.update, **{base + "scales": change}))
        with pytest.raises(error, match=message):
            load(path)
    edit(path, lambda tensors: tensors.pop(base + "scales"))
    with pytest.raises(WeightError, match=r"lacks 1 tensor: 'model\.layers\.1\.mlp\.up_proj\.scales'"):
        load(path)


def test_modules_that_the_config_leaves_out_must_be_plain(copied: Callable[..., Path]) -> None:
    """A list that names quantised modules, and modules of a list that are plain."""
    path = copied("fp8-block", modules_to_not_convert=["model.layers.1.mlp"])
    with pytest.raises(WeightError, match=r"surplus 3 tensors: 'model\.layers\.1\.mlp\.down_proj\.weight_scale_inv'"):
        load(path)

    def plain(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if "layers.1.mlp" in key]:
            tensors[key] = tensors[key].bfloat16()
            if key.endswith("_inv"):
                del tensors[key]

    edit(path, plain)
    assert load(path).formats["layers.1.gate_up"] == ("BF16",)
    assert load(path).formats["layers.0.gate_up"] == ("F8_E4M3",)


def test_patterns_of_compressed_tensors(copied: Callable[..., Path]) -> None:
    """Groups by patterns, an ignored module of a joined weight."""
    group = METHODS["ct-int4-128"].config["config_groups"]["group_0"]
    groups = {"a": group | {"targets": ["re:.*self_attn.*", "re:.*mlp.*"]}}
    path = copied("ct-int4-128", config_groups=groups, ignore=["re:.*layers\\.1\\..*k_proj$", "lm_head"])
    base = "model.layers.1.self_attn.k_proj."

    def plain(tensors: dict[str, torch.Tensor]) -> None:
        for key in [key for key in tensors if key.startswith(base)]:
            del tensors[key]
        tensors[base + "weight"] = torch.ones(64, 128, dtype=torch.bfloat16)

    edit(path, plain)
    assert load(path).formats["layers.1.qkv"] == ("I32_PACKED_4", "BF16")


def test_a_head_may_be_quantised(tmp_path: Path) -> None:
    plain = METHODS["ct-int8-channel"]
    method = replace(plain, config=plain.config | {"ignore": []}, modules=rf"{plain.modules}|lm_head")
    quantized, prompt = make_quantized(CASES["llama"], method, tmp_path, SEED), random_prompt(21, SEED)
    model = load(tmp_path)
    assert model.formats["lm_head"] == ("I8",)
    assert (Walker(model).logits(prompt) - oracle_logits(quantized.oracle, prompt)).abs().max() < BOUND


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("k_proj.k_scale", "v_proj.v_scale")])
def test_scales_of_the_kv_cache_may_be_there(copied: Callable[..., Path], names: tuple[str, str]) -> None:
    path = copied("ct-fp8-tensor")
    scales = {f"model.layers.{i}.self_attn.{name}": torch.tensor([0.5]) for i in range(2) for name in names}
    edit(path, lambda tensors: tensors.update(scales))
    config = EngineConfig(model=str(path), device="cpu", dtype="float32", kv_cache_dtype="fp8")
    files = open_model(config)
    assert len(load_model(files.definition, files.checkpoint, config).kv_scales) == 2
    edit(path, lambda tensors: tensors.update({"model.layers.0.mlp.k_scale": torch.ones(1)}))
    with pytest.raises(WeightError, match=r"surplus 1 tensor: 'model\.layers\.0\.mlp\.k_scale'"):
        load(path)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_biases_of_zeros_may_be_there(copied: Callable[..., Path], name: str) -> None:
    path = copied(name)
    bias = "model.layers.0.mlp.up_proj.bias"
    edit(path, lambda tensors: tensors.update({bias: torch.zeros(256, dtype=torch.float16)}))
    load(path)
    edit(path, lambda tensors: tensors[bias].fill_(1))
    with pytest.raises(WeightError, match=f"surplus 1 tensor: '{bias}'"):
        load(path)


def test_quantising_again_is_refused(made: Maker) -> None:
    path = str(made("gptq").path)
    message = r"--quantization int8: the checkpoint is quantised already \(quantization_config 'gptq'\)"
    with pytest.raises(ConfigError, match=message):
        LLM(path, quantization="int8")
    with pytest.raises(ConfigError, match=message):
        step_report(path, "H200", 1, 8, "int8")
    with pytest.raises(UnsupportedError, match=r"--load-format dummy: .*'gptq'"):
        LLM(path, load_format="dummy")


@pytest.mark.parametrize("name, note", [("fp8-tensor", "input_scale"), ("ct-fp8-tensor", "--kv-cache-dtype")])
def test_what_is_done_otherwise_is_said(made: Maker, name: str, note: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "tokenspeed"):
        load(made(name).path)
    assert note in caplog.text
