"""Every command of the documentation is run by a test, or a list says why not."""

from __future__ import annotations

import ast
import re

from tests.docs_commands import PYTHON, ROOT, RULES, SNIPPETS, TOKENSPEED, commands, rule_of, shown

SHOWN = shown()


def test_every_command_has_a_rule() -> None:
    assert [f"{each.page}: {each.text}" for each in SHOWN if each.kind != PYTHON and rule_of(each.text) is None] == []
    assert len(SHOWN) > 80


def test_every_rule_is_needed_and_says_where_or_why() -> None:
    used = {rule_of(each.text) for each in SHOWN if each.kind != PYTHON}
    foreign = [rule for rule in RULES if not rule.pattern.startswith(TOKENSPEED)]
    assert [rule.pattern for rule in foreign if rule not in used] == []
    for rule in RULES:
        assert rule.how in ("run", "serve", "load", "help", "elsewhere", "not")
        assert bool(rule.why) == (rule.how in ("elsewhere", "not"))
        assert rule.how != "elsewhere" or (ROOT / rule.why).is_file(), rule.why


def test_python_is_run_or_looked_at() -> None:
    pages = {each.page for each in SHOWN if each.kind == PYTHON}
    assert set(SNIPPETS) < pages
    for page, test in SNIPPETS.items():
        assert page.rpartition("/")[2] in (ROOT / test).read_text()
    for each in SHOWN:
        assert each.kind != PYTHON or ast.parse(each.text).body


def test_commands_are_found() -> None:
    text = (
        "a\n\n    tokenspeed x \\\n      -d 1\n    make y  # why\n\n```sh\n$ curl y\n```\n```python\nimport z\n```\n"
        "say `make w` and `words`\n- item\n      more\n\n    cat > f <<'E'\n    1\n    2\n    E\n    pip install f\n"
        "# h\n    from m import n\n\n    n()\n"
    )
    found = [(each.kind, each.text) for each in commands(text, "p")]
    assert [text for kind, text in found if kind == PYTHON] == ["import z", "from m import n\n\nn()"]
    wanted = ["tokenspeed x -d 1", "make y", "curl y", "cat > f <<'E'\n1\n2\nE", "pip install f", "make w"]
    assert [text for kind, text in found if kind != PYTHON] == wanted


def test_a_new_kind_of_command_has_no_rule() -> None:
    assert rule_of("tokenspeed train MODEL") is None
    assert rule_of("rm -rf build") is None
    assert all(re.compile(rule.pattern) for rule in RULES)
