"""What the JSON files beside a Hugging Face tokenizer say: special tokens, end ids, chat template."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenspeed.config.generation import generation_from_hf
from tokenspeed.contracts.errors import FormatError

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(frozen=True)
class HubFiles:
    """The settings of one model directory. `special_tokens`: names such as `bos_token` to texts."""

    special_tokens: dict[str, str]
    eos_ids: tuple[int, ...]
    """From generation_config.json, or config.json where that names none."""
    chat_template: str | None
    add_bos: bool | None
    add_eos: bool | None
    added_tokens: dict[int, tuple[str, bool]]
    """`added_tokens_decoder` of tokenizer_config.json: id to text and whether it is special."""

    def ids_of_ends(self, eos_token_id: int | None) -> list[int]:
        """Every end id, the tokenizer's own first."""
        own = () if eos_token_id is None else (eos_token_id,)
        return list(dict.fromkeys((*own, *self.eos_ids)))


def read_hub_files(directory: Path) -> HubFiles:
    """Read the files that exist; absent ones count as empty. Raises FormatError, naming the file, on broken JSON."""
    settings = _read_object(directory / "tokenizer_config.json")
    tokens = _token_texts(_read_object(directory / "special_tokens_map.json")) | _token_texts(settings)
    return HubFiles(
        special_tokens=tokens,
        eos_ids=_eos_ids(directory),
        chat_template=_chat_template(directory, settings),
        add_bos=_flag(settings, "add_bos_token"),
        add_eos=_flag(settings, "add_eos_token"),
        added_tokens=_added_tokens(settings, directory / "tokenizer_config.json"),
    )


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise FormatError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{path}: not UTF-8 at byte {error.start}") from None


def _token_texts(source: dict[str, Any]) -> dict[str, str]:
    found = {name: _token_text(source.get(name)) for name in _NAMED_TOKENS}
    return {name: text for name, text in found.items() if text is not None}


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _flag(source: dict[str, Any], name: str) -> bool | None:
    value = source.get(name)
    return value if isinstance(value, bool) else None


def _eos_ids(directory: Path) -> tuple[int, ...]:
    config, generation = (_read_object(directory / name) for name in ("config.json", "generation_config.json"))
    ids = generation_from_hf(config, generation).eos_token_ids
    if not all(isinstance(token_id, int) for token_id in ids):
        raise FormatError(f"{directory}: eos_token_id must be an integer or a list of them, got {ids!r}")
    return ids


def _chat_template(directory: Path, settings: dict[str, Any]) -> str | None:
    template_file = directory / "chat_template.jinja"
    if template_file.is_file():
        return _read_text(template_file)
    value = settings.get("chat_template", _read_object(directory / "chat_template.json").get("chat_template"))
    if isinstance(value, list):  # several named ones
        value = {entry.get("name"): entry.get("template") for entry in value if isinstance(entry, dict)}.get("default")
    return value if isinstance(value, str) else None


def _added_tokens(settings: dict[str, Any], path: Path) -> dict[int, tuple[str, bool]]:
    entries = settings.get("added_tokens_decoder") or {}
    try:
        return {int(key): (str(entry["content"]), bool(entry.get("special"))) for key, entry in entries.items()}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: added_tokens_decoder is not usable: {error!r}") from None
