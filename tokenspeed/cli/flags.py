"""Flags shared by commands: those of EngineConfig and SamplingParams come from their definitions."""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any, get_type_hints

from tokenspeed.config.engine import EngineConfig, flag
from tokenspeed.config.serving import Limits
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
    """One flag for each field of EngineConfig."""
    _add_settings(parser.add_argument_group("engine"), EngineConfig, leave_out)


def add_limit_flags(parser: argparse.ArgumentParser) -> None:
    """One flag for each field of Limits."""
    _add_settings(parser.add_argument_group("limits"), Limits)


def limit_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `Limits` from parsed flags."""
    return {setting.name: getattr(options, setting.name) for setting in fields(Limits)}


def _add_settings(
    group: argparse._ArgumentGroup, settings: type[EngineConfig | Limits], leave_out: tuple[str, ...] = ()
) -> None:
    hints = get_type_hints(settings)
    for setting in fields(settings):
        if setting.name in leave_out:
            continue
        text = setting.metadata["help"]
        if setting.default is not None:
            text += f" (default: {setting.default})"
        options: dict[str, Any] = {"dest": setting.name, "default": setting.default, "help": text}
        if hints[setting.name] is bool:
            group.add_argument(flag(setting.name), action=argparse.BooleanOptionalAction, **options)
            continue
        choices = setting.metadata["choices"]
        wanted = getattr(hints[setting.name], "__args__", (hints[setting.name],))
        kind = next((kind for kind in (int, float) if kind in wanted), str)
        metavar = None if choices else {int: "N", float: "X"}.get(kind, setting.name.upper())
        group.add_argument(flag(setting.name), type=kind, choices=choices or None, metavar=metavar, **options)


def engine_settings(options: argparse.Namespace) -> dict[str, Any]:
    """Keywords of `LLM` from parsed flags."""
    given = vars(options)
    return {setting.name: given[setting.name] for setting in fields(EngineConfig) if setting.name in given}


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
    parser.add_argument("--gpu", metavar="NAME", help="a GPU by name (H200); by default this machine, as measured")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences decoding together (default: 1)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens each one holds (default: 1024)")
    parser.add_argument(
        "--quantization", default="none", metavar="KIND", help="none, fp8, int8 or int4 (default: none)"
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
