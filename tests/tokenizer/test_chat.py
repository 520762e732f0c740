from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.tokenizer.bpe_models import LLAMA3, gguf_metadata, split_with, train
from tokenspeed.contracts.errors import ConfigError, ParameterError
from tokenspeed.tokenizer.base import Tokenizer
from tokenspeed.tokenizer.chat import ChatTemplate, load_chat_template
from tokenspeed.tokenizer.gguf import tokenizer_from_gguf

HEADERS = """
{{- bos_token }}
{%- if tools %}
    {{- '[tools]' }}
    {%- for tool in tools %}
        {{- tool | tojson(indent=2) + '\n' }}
    {%- endfor %}
{%- endif %}
{% for message in messages %}
    {%- if message.role not in ('system', 'user', 'assistant') %}{% continue %}{% endif %}
    {% if loop.index0 == 0 and message['role'] == 'assistant' %}
        {{ raise_exception('the first message cannot be from the assistant') }}
    {% endif %}
    {{- '<h>' + message['role'] + '</h>\n\n' }}
    {%- generation %}{{ message['content'] | trim }}{% endgeneration %}{{ eos_token }}
{% endfor %}
{%- if add_generation_prompt %}{{ '<h>assistant</h>\n\n' }}{% endif %}
"""
TURNS = """
{%- set ns = namespace(last=-1, self='kept') %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.content is string %}{{ message.content }}
    {%- else %}{% for part in message.content %}{{ part.text if part.type == 'text' else '<image>' }}{% endfor %}
    {%- endif %}
    {%- if message.tool_calls %}{{ message.tool_calls | tojson }}{% endif %}
    {%- if loop.index0 > ns.last and enable_thinking is defined %}<think>{{ enable_thinking }}</think>{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}
{{- strftime_now('%Y') | length }}{{ ns.self }}
"""
CHAT: list[dict[str, Any]] = [
    {"role": "system", "content": " be brief & <kind> \n"},
    {"role": "user", "content": [{"type": "text", "text": "naïve? 日本"}, {"type": "image"}]},
    {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": {"x": "<é>", "n": None}}]},
    {"role": "user", "content": "and 'quotes' \"too\"?"},
]
FLAT = [message if isinstance(message["content"], str) else message | {"content": "flat"} for message in CHAT]
TOOLS = [{"type": "function", "function": {"name": "f", "description": "a < b & 'c'", "parameters": {"x": [1, 2.5]}}}]
SPECIAL = {"bos_token": "<|bos|>", "eos_token": "<|im_end|>"}


@pytest.fixture(scope="module")
def oracle() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=train(split_with(LLAMA3)), **SPECIAL)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_from_gguf(gguf_metadata(train(split_with(LLAMA3)), "llama-bpe"))


@pytest.mark.parametrize("add_generation_prompt", [True, False])
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize(
    "template, messages, variables",
    [
        (HEADERS, FLAT, {}),
        (HEADERS, [*FLAT[1:2], {"role": "tool", "content": "skipped"}], {}),
        (TURNS, CHAT, {}),
        (TURNS, CHAT, {"enable_thinking": False}),
        (TURNS, CHAT[1:], {"enable_thinking": True}),
    ],
)
def test_rendering_is_that_of_transformers(
    oracle: PreTrainedTokenizerFast,
    template: str,
    messages: list[dict],
    variables: dict[str, Any],
    tools: list[Any] | None,
    add_generation_prompt: bool,
) -> None:
    expected = oracle.apply_chat_template(
        messages,
        chat_template=template,
        tools=tools,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        **variables,
    )
    got = ChatTemplate(template, SPECIAL).render(messages, tools, add_generation_prompt, **variables)
    assert got == expected
    assert messages[-1]["content"] in got or messages[-1]["role"] == "tool"


def test_plain_is_used_only_by_name(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConfigError, match="--chat-template plain"):
        load_chat_template(tokenizer)
    plain = load_chat_template(tokenizer, "plain")
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": " Hi?\n"}]
    assert plain.render(messages) == "<|bos|>System: Be kind.\nUser: Hi?\nAssistant:"
    assert plain.render(messages, add_generation_prompt=False) == "<|bos|>System: Be kind.\nUser: Hi?\n"


def test_where_a_template_comes_from(tmp_path: Path) -> None:
    metadata = gguf_metadata(train(split_with(LLAMA3)), "llama-bpe") | {
        "tokenizer.chat_template": "model{{ bos_token }}"
    }
    tokenizer = tokenizer_from_gguf(metadata)
    file = tmp_path / "own.jinja"
    file.write_text("file{{ eos_token }}", encoding="utf-8")
    assert load_chat_template(tokenizer).render([]) == "model<|bos|>"
    assert load_chat_template(tokenizer, str(file)).render([]) == "file<|im_end|>"
    assert load_chat_template(tokenizer, "text{{ messages | length }}").render([]) == "text0"
    with pytest.raises(ConfigError, match=r"nowhere\.jinja.*plain"):
        load_chat_template(tokenizer, str(tmp_path / "nowhere.jinja"))
    with pytest.raises(ConfigError, match="line 2"):
        load_chat_template(tokenizer, "ok\n{% for %}")


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].missing.deeper }}", "no attribute|undefined"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "range|Range"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.__init__.__globals__ }}", "unsafe"),
        ("{{ cycler.__init__.__globals__.os }}", "unsafe"),
        ("{{ raise_exception.__globals__.json }}", "unsafe"),
        ("{{ '{0.__class__.__mro__}'.format(1) }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}{{ ns }}", "__class__"),
        ("{% set ns = namespace([['_x', 1]]) %}{{ ns }}", "_x"),
        ("{% include '/etc/passwd' %}", "loader"),
    ],
)
def test_failures_and_escapes_are_parameter_errors(template: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        ChatTemplate(template, {}).render([{"role": "user", "content": "x"}])


def test_objects_never_reach_a_template() -> None:
    class Leaky:
        secret = "s"

    with pytest.raises(ParameterError, match="JSON"):
        ChatTemplate("{{ messages[0].content.secret }}", {}).render([{"role": "user", "content": Leaky()}])


def test_rendering_leaves_the_messages_alone() -> None:
    messages = [{"role": "user", "content": "a"}]
    with pytest.raises(ParameterError):
        ChatTemplate("{% for m in messages %}{% set _ = m.update(role='x') %}{% endfor %}", {}).render(messages)
    assert messages == [{"role": "user", "content": "a"}]
