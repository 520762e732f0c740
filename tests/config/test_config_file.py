"""Configuration files: what they may say, and how whatever is wrong is named."""

from __future__ import annotations

import random
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.seeds import SEED
from tokenspeed.config.file import MAX_BYTES, read_config_file
from tokenspeed.config.settings import About, check, setting, settings_of
from tokenspeed.contracts.errors import ConfigError

SECRET = "sk-not-to-be-shown"


@dataclass(frozen=True)
class Oven:
    """One setting of each kind."""

    heat: int = setting(180, "degrees", least=50, most=300)
    fan_share: float | None = setting(None, "of its speed", least=0, most=1, above=True)
    light: bool = setting(True, "is on")
    dish: str | None = setting(None, "what is in it", alias="--what-is-in-it")
    mode: str = setting("bake", "how", choices=("bake", "grill"))
    guests: tuple[str, ...] = setting((), "who eats")
    hours: tuple[int, ...] = setting((), "when", least=0, most=23)
    key: str = setting("", "of the door", secret=True)

    def __post_init__(self) -> None:
        check(self)


def read(folder: Path, text: str | bytes) -> dict[str, Any]:
    path = folder / "oven.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_config_file(str(path), settings_of(Oven))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("heat: 200", {"heat": 200}),
        ("heat: 0x40", {"heat": 64}),
        ("fan-share: 0.5", {"fan_share": 0.5}),
        ("fan_share: 1", {"fan_share": 1}),
        ("fan-share: null", {"fan_share": None}),
        ("light: no", {"light": False}),
        ("light: true\nmode: grill", {"light": True, "mode": "grill"}),
        ("what-is-in-it: cake", {"dish": "cake"}),
        ("dish: '12'", {"dish": "12"}),
        ("guests: Ann", {"guests": ("Ann",)}),
        ("guests: [Ann, 'Bob']", {"guests": ("Ann", "Bob")}),
        ("guests:\n- Ann\n- Bob\n", {"guests": ("Ann", "Bob")}),
        ("guests: []", {"guests": ()}),
        ("hours: [7, 19]", {"hours": (7, 19)}),
        ("{}", {}),
        ("---\nheat: 99  # low\n...\n", {"heat": 99}),
        ("\ufeffheat: 99", {"heat": 99}),
        ("dish: Käse", {"dish": "Käse"}),
        ("guests: [&a Ann, *a]", {"guests": ("Ann", "Ann")}),
    ],
)
def test_what_a_file_may_say(tmp_path: Path, text: str, expected: dict[str, Any]) -> None:
    assert read(tmp_path, text) == expected
    Oven(**expected)


@pytest.mark.parametrize("seed", [SEED, SEED + 1, SEED + 2])
def test_whatever_is_written_is_read(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    values: dict[str, Any] = {
        "heat": rng.randint(50, 300),
        "fan_share": rng.uniform(0.01, 1),
        "light": rng.random() < 0.5,
        "dish": "".join(chr(rng.choice([rng.randrange(32, 127), rng.randrange(160, 1000)])) for _ in range(30)),
        "mode": rng.choice(["bake", "grill"]),
        "guests": tuple(str(rng.randrange(10**6)) for _ in range(rng.randrange(4))),
        "hours": tuple(rng.randrange(24) for _ in range(rng.randrange(4))),
    }
    names = {name: name.replace("_", rng.choice("-_")) for name in values}
    written = {names[name]: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    assert read(tmp_path, yaml.safe_dump(written, allow_unicode=rng.random() < 0.5)) == values


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("heat: 20", "line 1: heat must be from 50 to 300, got 20"),
        ("light: on\nheat: 301", "line 2: heat must be from 50 to 300, got 301"),
        ("heat: hot", "heat must be int, got 'hot'"),
        ("heat: 99.5", "heat must be int, got 99.5"),
        ("heat: true", "heat must be int, got True"),
        ("heat: null", "heat must be int, got None"),
        ("heat: [99]", "heat must be int, got a list"),
        ("heat: {a: 1}", "heat must be int, got a dict"),
        ("fan-share: 0", "fan-share must be above 0 and at most 1, got 0"),
        ("fan-share: .nan", "fan-share must be above 0 and at most 1 and finite, got nan"),
        ("fan-share: no", "fan-share must be float or none, got False"),
        ("light: 1", "light must be bool, got 1"),
        ("light: 'on'", "light must be bool, got 'on'"),
        ("dish: 12", "dish must be str or none, got 12: put it in quotes"),
        ("dish: 2026-01-02", "put it in quotes"),
        ("dish: yes", "dish must be str or none, got True: put it in quotes"),
        ("mode: fry", "mode must be one of bake, grill, got 'fry'"),
        ("guests: [Ann, 7]", "guests must be str, got 7: put it in quotes"),
        ("guests: [[Ann]]", "guests must be str, got a list"),
        ("hours: [7, 24]", "hours must be from 0 to 23, got 24"),
        ("hours: x", "hours must be int, got 'x'"),
        ("heta: 99", "line 1: unknown key 'heta' (is it heat?)"),
        ("no-light: true", "unknown key 'no-light' (write light: false)"),
        ("zzz: 1", "unknown key 'zzz' (keys are flags without --)"),
        ("<<: {heat: 99}", "unknown key '<<'"),
        ("heat: 99\nlight: on\nheat: 99", "line 3: heat is there twice"),
        ("fan-share: 1\nfan_share: 1", "line 2: fan_share is there twice"),
        ("dish: a\nwhat-is-in-it: a", "line 2: what-is-in-it is there twice"),
        ("? [heat]\n: 99", "line 1: a key must be the name of a flag"),
        ("", "must be a mapping of flag names to values, is nothing"),
        ("# heat: 99\n", "is nothing"),
        ("- heat", "is a list"),
        ("heat", "is text"),
        ("heat: 99\n---\nheat: 98", "not YAML: expected a single document"),
        ("heat: [99", "not YAML"),
        ("heat: 99\n\tlight: on", "not YAML"),
        ("dish: !!python/object/apply:os.system [ls]", "not YAML: could not determine a constructor"),
        ("dish: *a", "not YAML: found undefined alias (line 1, column 7)"),
        ("heat: 99\ndish: a: b", "not YAML: mapping values are not allowed here (line 2, column 8)"),
        ("dish: 2026-99-99", "line 1: not YAML: the value is not of its kind"),
        ("heat: 99\ndish: !!timestamp a", "line 2: not YAML: the value is not of its kind"),
        ("light: !!bool a", "line 1: not YAML: the value is not of its kind"),
        (b"dish: \xff", "not UTF-8 text (byte 6)"),
        ("dish: a\0b", "not YAML"),
        ("heat: " + "[" * 5000, "nested too deeply"),
        ("#" * (MAX_BYTES + 1), f"longer than {MAX_BYTES} bytes"),
    ],
)
def test_what_a_file_may_not_say(tmp_path: Path, text: str | bytes, complaint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    said = str(caught.value)
    assert complaint in said
    assert ("not YAML" in said) == ("not YAML" in complaint)
    assert said.startswith(f"--config {tmp_path / 'oven.yaml'}")
    assert "\n" not in said
    assert len(said) < 400


@pytest.mark.parametrize("path, complaint", [("absent.yaml", "No such file"), (".", "Is a directory")])
def test_files_that_cannot_be_read(tmp_path: Path, path: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=rf"--config .*: cannot be read \({complaint}"):
        read_config_file(str(tmp_path / path), settings_of(Oven))


def test_lists_that_grow_without_end_are_not_shown(tmp_path: Path) -> None:
    laughs = "".join(f"- &a{at} [{', '.join([f'*a{at - 1}'] * 10)}]\n" for at in range(1, 12))
    with pytest.raises(ConfigError, match="guests must be str, got a list"):
        read(tmp_path, f"guests:\n- &a0 [x]\n{laughs}")
    with pytest.raises(ConfigError, match="recursive"):
        read(tmp_path, "guests: &a [*a]")


@pytest.mark.parametrize("text", [f"key: {SECRET}\nkey: b", f"key: [{SECRET}]", "key: 123454321"])
def test_secrets_are_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, text)
    assert SECRET not in str(caught.value)
    assert "123454321" not in str(caught.value)
    assert SECRET not in repr(Oven(key=SECRET))


@pytest.mark.parametrize(
    "value",
    [
        "{}: 1",
        '"{}',
        "'{}",
        "[{}",
        "{{a: {}",
        '"\\q {}',
        "@{}",
        "*{}",
        "!{} a",
        "!{}!a b",
        "!!int {}",
        "!!float {}",
        "!!bool {}",
        "!!timestamp {}",
        "!!binary {}ä",
        "{}\x01",
        "a\n{}",
    ],
)
def test_what_is_no_yaml_is_not_quoted(tmp_path: Path, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, f"heat: 99\nkey: {value.format(SECRET)}")
    assert "not-to-be-shown" not in str(caught.value)


@pytest.mark.parametrize(
    "about, rule",
    [
        (About("", least=1), "at least 1"),
        (About("", least=0, most=7), "from 0 to 7"),
        (About("", least=0, above=True), "above 0"),
        (About("", least=0, most=1, above=True), "above 0 and at most 1"),
    ],
)
def test_rules_in_words(about: About, rule: str) -> None:
    assert about.rule == rule


def test_who_uses_the_library_needs_no_yaml() -> None:
    code = "import sys, tokenspeed.cli.main, tokenspeed.config.file; assert 'yaml' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
