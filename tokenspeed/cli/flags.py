"""Flags, made of the definitions of settings, and what was given of them: by flag, file or variable."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.file import read_config_file
from tokenspeed.config.settings import Setting, flag, settings_of
from tokenspeed.contracts.errors import ConfigError

SAMPLING: dict[str, tuple[type, str]] = {
    "max_tokens": (int, "most tokens to generate (default: the model's, else {max_tokens})"),
    "temperature": (float, "0 is greedy (default: the model's, else 1)"),
    "top_k": (int, "keep the k best tokens; 0 keeps all (default: the model's, else 0)"),
    "top_p": (float, "keep the best tokens up to this probability; 1 keeps all (default: the model's, else 1)"),
    "min_p": (
        float,
        "keep tokens at least this likely, as a part of the best one; 0 keeps all (default: the model's, else 0)",
    ),
    "presence_penalty": (float, "subtracted from the logits of tokens in the output (default: 0)"),
    "frequency_penalty": (float, "the same, for each time they occur there (default: 0)"),
    "repetition_penalty": (
        float,
        "above 1 makes tokens of prompt and output less likely (default: the model's, else 1)",
    ),
    "min_tokens": (int, "no end before this many tokens (default: 0)"),
    "logprobs": (int, "report this many alternatives per token (needs --json)"),
    "prompt_logprobs": (int, "the same for the prompt (needs --json)"),
}


def add_engine_flags(parser: argparse.ArgumentParser, leave_out: tuple[str, ...] = ()) -> None:
    """One flag for each field of EngineConfig, and --config for a file of them."""
    add_config_flag(parser)
    add_settings(parser, "engine", EngineConfig, leave_out)


def add_config_flag(parser: argparse.ArgumentParser) -> None:
    """The flag that names a configuration file."""
    parser.add_argument(
        "--config",
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a YAML file of flags (max-num-seqs: 8); those of the command line come before it",
    )


def add_settings(parser: argparse.ArgumentParser, title: str, settings: type, leave_out: tuple[str, ...] = ()) -> None:
    """One flag for each field of a settings class. What is not given is not in the namespace."""
    group = parser.add_argument_group(title)
    for each in settings_of(settings):
        if each.name in leave_out:
            continue
        options = _options(each)
        group.add_argument(each.flag, help=_help(each), **options)
        if each.about.alias:
            group.add_argument(each.about.alias, help=argparse.SUPPRESS, **options)


def _options(each: Setting) -> dict[str, Any]:
    shared = {"dest": each.name, "default": argparse.SUPPRESS}
    if each.kind is bool:
        return {"action": argparse.BooleanOptionalAction, **shared}
    options: dict[str, Any] = {"type": each.kind, **shared}
    if each.about.choices:
        options["choices"] = each.about.choices
    else:
        options["metavar"] = {int: "N", float: "X"}.get(each.kind, each.name.upper())
    if each.several:
        options |= {"action": "extend", "nargs": "+"} if each.about.spread else {"action": "append"}
    return options


def _help(each: Setting) -> str:
    """What it does, its environment variable and its default."""
    env = f"; {each.about.env} in the environment is the same" if each.about.env else ""
    default = f" (default: {each.default})" if each.default not in (None, (), "") else ""
    return f"{each.about.help}{env}{default}".replace("%", "%%")


def given_settings(
    options: argparse.Namespace, known: Sequence[Setting], environment: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Values of those settings that were given: on the command line, else in the file of --config, else in the
    environment. Raises ConfigError for a file that cannot be used."""
    variables = os.environ if environment is None else environment
    found = {
        each.name: (variables[each.about.env],) if each.several else variables[each.about.env]
        for each in known
        if each.about.env in variables
    }
    given = vars(options)
    if "config" in given:
        found |= read_config_file(given["config"], known)
    for each in known:
        if each.name in given:
            value = given[each.name]
            found[each.name] = tuple(value) if each.several else value
    return found


def engine_settings(options: argparse.Namespace, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Keywords of `LLM` from parsed flags, and from the file that they name. Raises ConfigError."""
    return given_settings(options, [each for each in settings_of(EngineConfig) if each.name not in leave_out])


def add_sampling_flags(
    parser: argparse.ArgumentParser, max_tokens: str = "128", leave_out: tuple[str, ...] = ()
) -> None:
    """Flags of SamplingParams. max_tokens: what the help says of its default."""
    group = parser.add_argument_group("sampling")
    for name, (kind, text) in SAMPLING.items():
        if name not in leave_out:
            shown = text.format(max_tokens=max_tokens)
            group.add_argument(flag(name), type=kind, metavar="N" if kind is int else "X", dest=name, help=shown)
    group.add_argument("--ignore-eos", action="store_true", help="go on after an end-of-text token")
    group.add_argument(
        "--stop", nargs="+", metavar="TEXT", default=[], help="texts that end the output, and are left out of it"
    )
    group.add_argument(
        "--stop-token-ids", type=int, nargs="+", metavar="ID", default=[], help="token ids that end the text"
    )


def sampling_settings(options: argparse.Namespace) -> dict[str, Any]:
    """What was given of SamplingParams."""
    values = vars(options)
    given = {name: values[name] for name in SAMPLING if values.get(name) is not None}
    return given | {"ignore_eos": options.ignore_eos, "stop": options.stop, "stop_token_ids": options.stop_token_ids}


def add_floor_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `sol` and `plan`: the step, and the machine whose limits count."""
    parser.add_argument(
        "--gpu", metavar="NAME", help="a GPU by name (H200, H100, B200, MI350X); by default this machine, as measured"
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences decoding together (default: 1)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens each one holds (default: 1024)")
    parser.add_argument(
        "--quantization",
        default="none",
        metavar="KIND",
        help="none, fp8, int8, int4 or mxfp4 (default: none)",
    )
    parser.add_argument("--kv-cache-dtype", default="bfloat16", metavar="TYPE", help="of the KV (default: bfloat16)")
    parser.add_argument("--json", action="store_true", help="print JSON")


def read_text(path: str) -> str:
    """Text of a UTF-8 file, or of stdin for "-". Raises ConfigError when it cannot be read."""
    import sys
    from pathlib import Path

    try:
        raw = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return raw.decode("utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{'stdin' if path == '-' else path}: not UTF-8 text (byte {error.start})") from None
