"""Chat templates: Jinja in a sandbox, with the helpers that published templates call."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from tokenspeed.contracts.errors import ConfigError, ParameterError
from tokenspeed.tokenizer.base import Tokenizer

if TYPE_CHECKING:
    from jinja2 import Template
    from jinja2.sandbox import ImmutableSandboxedEnvironment

PLAIN = """\
{%- for message in messages %}
    {{- message.role | capitalize + ": " + message.content | trim + "\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{- "Assistant:" }}{% endif %}
"""
"""A transcript for models trained without a chat format. Used only when asked for by the name `plain`."""
BUILT_IN = {"plain": PLAIN}
STOPS = {"plain": ["\nUser:"]}
"""Texts that end a turn, where no token does."""


class ChatTemplate:
    """A compiled template. `name` says in errors where it came from; `stop` holds texts that end a turn, for templates
    in which no token does."""

    def __init__(
        self, text: str, special_tokens: Mapping[str, str], name: str = "chat template", stop: Sequence[str] = ()
    ) -> None:
        """Compile. Raises ConfigError, with the line, where the text is not a template."""
        from jinja2 import TemplateSyntaxError

        self.stop = list(stop)
        self._name = name
        self._special_tokens = dict(special_tokens)
        try:
            self._template: Template = _environment().from_string(text)
        except TemplateSyntaxError as error:
            raise ConfigError(f"{name}, line {error.lineno}: {error.message}") from None

    def render(
        self,
        /,  # a variable may have any name
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The prompt of a conversation; encode it with add_special_tokens=False, templates write bos themselves.

        messages: objects with `role` and `content`. variables: whatever else the template reads, as JSON values.
        Raises ParameterError where the template refuses the messages, fails, or tries to leave the sandbox.
        """
        from jinja2 import TemplateError

        context = self._special_tokens | variables
        context |= {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(_plain_data(context))
        except TemplateError as error:
            raise ParameterError(f"{self._name}: {error.message}") from None
        except Exception as error:  # whatever an expression of the template may raise
            raise ParameterError(f"{self._name} failed: {type(error).__name__}: {error}") from None


def load_chat_template(tokenizer: Tokenizer, argument: str | None = None) -> ChatTemplate:
    """The template to use: `argument` (a built-in name, a path, or the template itself), else the model's own.

    Raises ConfigError where there is none, where the file cannot be read, or where the text is not a template.
    """
    if argument is None:
        if tokenizer.chat_template is None:
            raise ConfigError("this model has no chat template; a base model can be given --chat-template plain")
        return ChatTemplate(tokenizer.chat_template, tokenizer.special_tokens, "the model's chat template")
    if argument in BUILT_IN:
        text = ("{{- bos_token }}" if _begins_with_bos(tokenizer) else "") + BUILT_IN[argument]
        return ChatTemplate(text, tokenizer.special_tokens, f"chat template {argument}", STOPS.get(argument, ()))
    if "{" in argument or "\n" in argument:
        return ChatTemplate(argument, tokenizer.special_tokens, "the given chat template")
    return ChatTemplate(_read(Path(argument)), tokenizer.special_tokens, f"chat template {argument}")


def _begins_with_bos(tokenizer: Tokenizer) -> bool:
    """Whether the model was trained on texts that begin so."""
    return "bos_token" in tokenizer.special_tokens and tokenizer.encode("")[:1] == [tokenizer.bos_token_id]


def _read(path: Path) -> str:
    try:
        return path.expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        known = ", ".join(BUILT_IN)
        raise ConfigError(f"chat template {path}: {reason} (give a file, a template, or a name: {known})") from None


def _plain_data(context: Mapping[str, Any]) -> dict[str, Any]:
    """A copy made of JSON types only, so that a template meets no object with methods of its own."""
    try:
        return msgspec.json.decode(msgspec.json.encode(context))
    except (TypeError, ValueError) as error:
        raise ParameterError(f"messages, tools and template variables must be JSON values: {error}") from None


def _environment() -> ImmutableSandboxedEnvironment:
    from jinja2.ext import Extension, loopcontrols
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class GenerationTag(Extension):
        """`{% generation %}` marks what the model said, for training; here its body is simply rendered."""

        tags = {"generation"}

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            return Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now, namespace=_namespace())
    return environment


def _namespace() -> type:
    from jinja2.exceptions import SecurityError
    from jinja2.utils import Namespace

    class PublicNamespace(Namespace):
        """Jinja's namespace without underscore names, which could pose as internals of the object."""

        def __init__(*args: Any, **kwargs: Any) -> None:  # no named self: a template may set `self`
            attributes = dict(*args[1:], **kwargs)
            for name in attributes:
                _refuse_internal(name)
            Namespace.__init__(args[0], attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _refuse_internal(name)
            super().__setitem__(name, value)

    def _refuse_internal(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise SecurityError(f"a namespace cannot hold the name {name!r}")

    return PublicNamespace


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without the HTML escapes of Jinja's own filter."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
