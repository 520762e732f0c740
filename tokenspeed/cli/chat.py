"""`tokenspeed chat`: a conversation on a terminal, or one answer to a message."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from tokenspeed.cli.flags import add_engine_flags, add_sampling_flags, engine_settings, read_text, sampling_settings
from tokenspeed.cli.generate import load_llm, measured_timings
from tokenspeed.config.engine import EngineConfig
from tokenspeed.contracts.errors import PromptError, TokenSpeedError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.parsing.formats import reply_format
from tokenspeed.parsing.reply import ReplyFormat
from tokenspeed.tokenizer.base import Tokenizer
from tokenspeed.tokenizer.chat import ChatTemplate, load_chat_template

if TYPE_CHECKING:
    from tokenspeed.engine.llm import LLM
    from tokenspeed.engine.output import RequestOutput

PROMPT = "> "
COMMANDS = "/reset forgets the conversation, /system TEXT sets the system message, /exit leaves"


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "chat",
        help="talk with a model",
        description="Talk with a model on the terminal, or give one message as an argument or on stdin and get one "
        f"answer. On the terminal: {COMMANDS}; Ctrl-C stops an answer, Ctrl-D leaves. Without --model: Gemma 3 270M, "
        "a base model, which needs --chat-template plain.",
    )
    parser.add_argument("message", nargs="?", help="one message to answer; without it, stdin is read")
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    parser.add_argument(
        "--timings",
        action=argparse.BooleanOptionalAction,
        help="a line of timings on stderr after each answer; by default after a single one",
    )
    add_sampling_flags(parser, max_tokens="as the context holds", leave_out=("logprobs", "prompt_logprobs"))
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Load, then answer once or until the user leaves."""
    interactive = options.message is None and sys.stdin.isatty()
    message = None if interactive else _message(options)
    sampling = sampling_settings(options)
    SamplingParams.from_dict(sampling)
    settings = engine_settings(options)
    tokenizer, template = _open(settings)
    llm = load_llm(settings)
    sampling["stop"] = [*sampling["stop"], *template.stop]
    if not isinstance(template, ChatTemplate):
        sampling["stop_token_ids"] = [*sampling["stop_token_ids"], *template.stop_ids]
    params = SamplingParams.from_dict({"max_tokens": None} | dict(llm.generation.sampling) | sampling)
    conversation = Conversation(llm, tokenizer, template, params, options.system)
    if message is not None:
        output = _say(conversation, message, [])
        if options.timings is not False:
            _print_timings(llm, output)
    else:
        _talk(conversation, bool(options.timings))


@dataclass
class Conversation:
    """What was said so far, and a model to go on with it."""

    llm: LLM
    tokenizer: Tokenizer
    template: ChatTemplate | ReplyFormat
    params: SamplingParams
    system: str | None = None
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, message: str) -> Iterator[tuple[str, RequestOutput]]:
        """Answer a message, in pieces of text. What was said until the iterator is dropped becomes part of the
        conversation; nothing does when the message cannot be answered.

        Raises PromptError where the conversation outgrows the context, ParameterError where the template refuses it.
        """
        turns = [*self.turns, {"role": "user", "content": message}]
        system = [{"role": "system", "content": self.system}] if self.system else []
        prompt = self.template.render([*system, *turns])
        ids = self.tokenizer.encode(prompt, add_special_tokens=False)
        said = ""
        try:
            for text, output in self._pieces(ids):
                shown = text if said else text.lstrip()
                said += shown
                yield shown, output
        finally:
            if said:
                self.turns = [*turns, {"role": "assistant", "content": said.rstrip()}]

    def _pieces(self, ids: list[int]) -> Iterator[tuple[str, RequestOutput]]:
        """What is new of the answer; what the model thinks aloud goes to stderr."""
        if isinstance(self.template, ChatTemplate):
            yield from self.llm.stream(ids, self.params)
            return
        parser, done, thinking = self.template.parser(), 0, False
        for _, output in self.llm.stream(ids, self.params):
            known = output.outputs[0].token_ids
            part, done = parser.push(known[done:]), len(known)
            content = part.content + (parser.finish().content if output.finished else "")
            if part.reasoning:
                print(part.reasoning, end="", file=sys.stderr, flush=True)
            if thinking and content:
                print("\n", file=sys.stderr)
            thinking = (thinking or bool(part.reasoning)) and not content
            yield content, output

    def reset(self) -> None:
        """Forget all but the system message."""
        self.turns = []


def _message(options: argparse.Namespace) -> str:
    message: str | None = options.message
    if message is None:
        message = read_text("-").strip()
    if not message:
        raise PromptError("the message is empty")
    return message


def _open(settings: dict[str, Any]) -> tuple[Tokenizer, ChatTemplate | ReplyFormat]:
    """Tokenizer and template, before any weights are read: a model without them is refused at once."""
    from tokenspeed.engine.intake import open_tokenizer
    from tokenspeed.runner.build import open_model

    config = EngineConfig.from_kwargs(settings)
    files = open_model(config)
    source = files.tokenizer
    tokenizer = None if source is None else open_tokenizer(str(source.path), source.format, source.name)
    if tokenizer is None:
        raise PromptError(f"{files.name} has no tokenizer, and a chat needs one")
    found = reply_format(tokenizer) if config.chat_template is None else None
    return tokenizer, found or load_chat_template(tokenizer, config.chat_template)


def _talk(conversation: Conversation, timings: bool) -> None:
    with suppress(ImportError):  # editing and history, where the platform has them
        import readline  # noqa: F401
    print(f"{COMMANDS}; Ctrl-C stops an answer, Ctrl-D leaves", file=sys.stderr)
    while (line := _read_line()) is not None:
        if not line:
            continue
        if line == "/exit":
            return
        if not _command(conversation, line):
            _answer(conversation, line, timings)


def _read_line() -> str | None:
    """A line without its blank ends, "" after Ctrl-C, None at the end of input."""
    try:
        return input(PROMPT).strip()
    except KeyboardInterrupt:
        print("\nCtrl-D or /exit leaves", file=sys.stderr)
        return ""
    except EOFError:
        print()
        return None


def _command(conversation: Conversation, line: str) -> bool:
    """Obey a command; whether the line was one."""
    name, _, rest = line.partition(" ")
    if not (name.startswith("/") and name[1:].isalpha()):
        return False
    if name == "/reset" and not rest:
        conversation.reset()
    elif name == "/system":
        conversation.system = rest.strip() or None
    else:
        print(f"no such command: {line} ({COMMANDS})", file=sys.stderr)
    return True


def _answer(conversation: Conversation, message: str, timings: bool) -> None:
    try:
        with _interrupts() as pressed:
            output = _say(conversation, message, pressed)
    except TokenSpeedError as error:
        print(f"tokenspeed: error: {error}", file=sys.stderr)
        return
    if timings:
        _print_timings(conversation.llm, output)


def _say(conversation: Conversation, message: str, pressed: list[int]) -> RequestOutput:
    """Print an answer as it comes, until something is `pressed`. Returns its output."""
    for text, so_far in conversation.answer(message):
        output = so_far
        print(text, end="", flush=True)
        if pressed:
            break
    print()
    return output


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collects the first Ctrl-C, so that a step under way can end; the second one is a KeyboardInterrupt."""
    pressed: list[int] = []

    def press(number: int, frame: FrameType | None) -> None:
        if pressed:
            signal.default_int_handler(number, frame)
        pressed.append(number)

    before = signal.signal(signal.SIGINT, press)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


def _print_timings(llm: LLM, output: RequestOutput) -> None:
    from tokenspeed.engine.core import StepClock
    from tokenspeed.engine.timings import timings_line

    print(timings_line(measured_timings(llm, output)), file=sys.stderr)
    llm.core.clock = StepClock()  # the next line is about the next answer alone
