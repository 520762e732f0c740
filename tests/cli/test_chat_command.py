"""`tokenspeed chat`: conversations with a model that says what it was told, and one real answer."""

from __future__ import annotations

import io
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.conftest import ROOT, Cli
from tests.parsing.harmony_bytes import IDS, harmony_tokenizer, ids_of
from tests.parsing.test_harmony_parser import PLAIN
from tokenspeed.cli import chat
from tokenspeed.cli.main import main
from tokenspeed.config.generation import GenerationDefaults
from tokenspeed.contracts.errors import PromptError
from tokenspeed.contracts.sampling import SamplingParams
from tokenspeed.engine.core import StepClock
from tokenspeed.parsing.formats import reply_format
from tokenspeed.tokenizer.chat import ChatTemplate, load_chat_template

LIMIT = 400
"""Characters, which are tokens here, of the longest prompt."""


class LetterTokenizer:
    """One token per character."""

    chat_template = None
    special_tokens: dict[str, str] = {}

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not add_special_tokens, "templates write special tokens themselves"
        return [ord(char) for char in text]


class ToldLLM:
    """Answers in the pieces it was told, and keeps the prompts. A piece that is a signal is raised."""

    generation = GenerationDefaults(sampling={"temperature": 0.25})

    def __init__(self, *answers: list[str | signal.Signals]) -> None:
        self.answers = list(answers)
        self.prompts: list[str] = []
        self.params: list[SamplingParams] = []
        self.dropped = 0
        self.core = SimpleNamespace(clock=None)

    def stream(self, ids: list[int], params: SamplingParams) -> Iterator[tuple[str, Any]]:
        if len(ids) > LIMIT:
            raise PromptError(f"the prompt has {len(ids)} tokens, {LIMIT} are allowed")
        self.prompts.append("".join(map(chr, ids)))
        self.params.append(params)
        return self._pieces(self.answers.pop(0))

    def _pieces(self, answer: list[str | signal.Signals]) -> Iterator[tuple[str, Any]]:
        try:
            for piece in answer:
                if isinstance(piece, signal.Signals):
                    signal.raise_signal(piece)
                else:
                    yield piece, SimpleNamespace()
        except GeneratorExit:
            self.dropped += 1
            raise


class Terminal(io.StringIO):
    """Lines typed by a user; "^C" is the key."""

    def isatty(self) -> bool:
        return True

    def readline(self, size: int | None = -1) -> str:  # type: ignore[override]
        line = super().readline(-1 if size is None else size)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """talk(llm, lines, *flags): type lines into a chat; gives the status, stdout and stderr."""

    def run(llm: ToldLLM, lines: list[str] | None, *flags: str) -> tuple[int, str, str]:
        tokenizer: Any = LetterTokenizer()
        monkeypatch.setattr(chat, "load_llm", lambda settings: llm)
        monkeypatch.setattr(
            chat, "_open", lambda settings: (tokenizer, load_chat_template(tokenizer, settings["chat_template"]))
        )
        monkeypatch.setattr(chat, "measured_timings", lambda llm, output: {"ttft_ms": 5.0})
        if lines is not None:
            monkeypatch.setattr(sys, "stdin", Terminal("".join(line + "\n" for line in lines)))
        before = signal.getsignal(signal.SIGINT)
        status = main(["chat", "--chat-template", "plain", *flags])
        assert signal.getsignal(signal.SIGINT) is before
        captured = capsys.readouterr()
        return status, captured.out.replace(chat.PROMPT, ""), captured.err

    return run


def test_a_conversation_is_kept(talk) -> None:
    llm = ToldLLM([" ", " Hello", " you.", " "], ["Two."])
    status, out, err = talk(llm, ["Hi there ", "", "  and 1+1?"])
    assert (status, out) == (0, "Hello you. \nTwo.\n\n")
    assert llm.prompts == [
        "User: Hi there\nAssistant:",
        "User: Hi there\nAssistant: Hello you.\nUser: and 1+1?\nAssistant:",
    ]
    assert len(err.splitlines()) == 1
    assert "/reset" in err


class HarmonyLLM(ToldLLM):
    """Gives the ids of its answers one by one."""

    def _pieces(self, answer: list[str | signal.Signals]) -> Iterator[tuple[str, Any]]:
        ids = ids_of("".join(map(str, answer)))
        for count in range(1, len(ids) + 1):
            sample = SimpleNamespace(token_ids=ids[:count])
            yield "", SimpleNamespace(outputs=[sample], finished=count == len(ids))


def test_thoughts_go_to_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A model that speaks harmony is asked in it, and only its answer is kept."""
    tokenizer: Any = harmony_tokenizer()
    template, llm = reply_format(tokenizer), HarmonyLLM([PLAIN], [PLAIN])
    assert template is not None
    monkeypatch.setattr(chat, "_open", lambda settings: (tokenizer, template))
    monkeypatch.setattr(chat, "load_llm", lambda settings: llm)
    monkeypatch.setattr(sys, "stdin", Terminal("one\ntwo\n"))
    monkeypatch.setattr(sys.modules[__name__], "LIMIT", 4000)
    assert main(["chat", "--stop-token-ids", "9"]) == 0
    captured = capsys.readouterr()
    assert captured.out.replace(chat.PROMPT, "") == "4 😀\n4 😀\n\n"
    assert captured.err.endswith(2 * "Just say 2 + 2 = 4 ✓.\n\n")
    assert llm.params[0].stop_token_ids == [9, IDS["<|return|>"], IDS["<|call|>"]]
    said = (
        "<|start|>assistant<|channel|>final<|message|>4 😀<|end|><|start|>user<|message|>two<|end|><|start|>assistant"
    )
    assert tokenizer.decode([ord(char) for char in llm.prompts[1]], skip_special_tokens=False).endswith(said)


def test_an_answer_is_kept_without_blank_ends(talk) -> None:
    llm = ToldLLM(["\n A ", "\n"], ["B"])
    talk(llm, ["one", "two"], "--chat-template", "{% for turn in messages %}[{{ turn.content }}]{% endfor %}")
    assert llm.prompts == ["[one]", "[one][A][two]"]
    assert llm.params[0].stop == []


def test_commands(talk) -> None:
    llm = ToldLLM(["A"], ["B"], ["C"], ["D"])
    lines = ["one", "/reset", "two", "/system Be  brief.", "three", "/system", "/etc/hosts?", "/bogus x", "/exit", "no"]
    status, _, err = talk(llm, lines, "--system", "Be kind.")
    assert status == 0
    assert llm.prompts == [
        "System: Be kind.\nUser: one\nAssistant:",
        "System: Be kind.\nUser: two\nAssistant:",
        "System: Be  brief.\nUser: two\nAssistant: B\nUser: three\nAssistant:",
        "User: two\nAssistant: B\nUser: three\nAssistant: C\nUser: /etc/hosts?\nAssistant:",
    ]
    assert [line.split(" (")[0] for line in err.splitlines()[1:]] == ["no such command: /bogus x"]


def test_ctrl_c_ends_the_answer_and_not_the_chat(talk) -> None:
    llm = ToldLLM(["Once ", "upon", signal.SIGINT, " a", " time"], ["Yes."])
    status, out, _ = talk(llm, ["A tale", "^C", "Go on"])
    assert (status, llm.dropped) == (0, 1)
    assert out == "Once upon a\nYes.\n\n"
    assert llm.prompts[1] == "User: A tale\nAssistant: Once upon a\nUser: Go on\nAssistant:"


def test_a_second_ctrl_c_leaves(talk) -> None:
    llm = ToldLLM(["Once", signal.SIGINT, signal.SIGINT, "never"])
    status, out, _ = talk(llm, ["A tale"])
    assert (status, out) == (130, "Once")


def test_an_answer_stopped_before_its_first_word_leaves_no_trace(talk) -> None:
    llm = ToldLLM([signal.SIGINT, "", "never"], ["Yes."])
    assert talk(llm, ["A tale", "Hi"])[0] == 0
    assert llm.prompts[1] == "User: Hi\nAssistant:"


def test_a_conversation_that_outgrows_the_context_can_be_reset(talk) -> None:
    llm = ToldLLM(["A"], ["B"], ["C"])
    status, out, err = talk(llm, ["x" * 300, "y" * 300, "z", "/reset", "w"])
    assert (status, out) == (0, "A\nB\nC\n\n")
    (line,) = (line for line in err.splitlines() if line.startswith("tokenspeed: error: "))
    assert f"{LIMIT} are allowed" in line
    assert llm.prompts[1] == "User: " + "x" * 300 + "\nAssistant: A\nUser: z\nAssistant:"
    assert llm.prompts[2] == "User: w\nAssistant:"


def test_what_the_model_is_asked_for(talk) -> None:
    llm = ToldLLM(["A"], ["B"])
    talk(llm, ["x"])
    talk(llm, ["x"], "--temperature", "0.5", "--max-tokens", "9", "--stop", "END", "--min-p", "0.125")
    assert llm.params == [
        SamplingParams(max_tokens=None, temperature=0.25, stop=["\nUser:"]),
        SamplingParams(max_tokens=9, temperature=0.5, stop=["END", "\nUser:"], min_p=0.125),
    ]


@pytest.mark.parametrize(
    "terminal, flag, shown",
    [
        (True, None, 0),
        (True, "--timings", 2),
        (True, "--no-timings", 0),
        (False, None, 1),
        (False, "--timings", 1),
        (False, "--no-timings", 0),
    ],
)
def test_timings_follow_single_answers(talk, terminal: bool, flag: str | None, shown: int) -> None:
    flags = [flag] if flag else []
    llm = ToldLLM(["A"], ["B"])
    _, out, err = talk(llm, ["x", "y"], *flags) if terminal else talk(llm, None, *flags, "x")
    assert out == ("A\nB\n\n" if terminal else "A\n")
    assert err.count("first token 5 ms\n") == shown
    assert (llm.core.clock == StepClock()) == (shown > 0)


def test_an_interrupted_single_answer_is_a_failure(talk) -> None:
    assert talk(ToldLLM(["Once", signal.SIGINT, "never"]), None, "A tale")[0] == 130


def test_only_a_built_in_template_brings_stop_strings() -> None:
    tokenizer: Any = LetterTokenizer()
    assert load_chat_template(tokenizer, "plain").stop == ["\nUser:"]
    assert load_chat_template(tokenizer, "{{ messages }}").stop == ChatTemplate("x", {}).stop == []


def test_a_base_model_is_refused_before_it_is_loaded(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(chat, "load_llm")
    ran = cli("chat", "Hi")
    assert (ran.status, ran.out) == (1, "")
    assert "--chat-template plain" in ran.err
    assert len(ran.err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["", "--chat-template", "plain"], "the message is empty"),
        (["x", "--chat-template", "no/such/file"], "no/such/file"),
        (["x", "--temperature", "-1"], "temperature"),
        (["x", "--load-format", "dummy", "--model", "llama-3.2-1b"], "llama-3.2-1b has no tokenizer"),
        (["x", "--model", "no/such/model/here"], "no/such/model/here"),
    ],
)
def test_what_is_refused(cli: Cli, arguments: list[str], words: str) -> None:
    ran = cli("chat", *arguments)
    assert (ran.status, ran.out) == (1, "")
    assert words in ran.err


SHORT = ("--chat-template", "plain", "--temperature", "0", "--max-tokens", "5", "--max-model-len", "128")


def test_one_answer_of_a_real_model(cli: Cli) -> None:
    told = cli("chat", *SHORT, "What is the capital of France?")
    piped = cli("chat", *SHORT, stdin=b"What is the capital of France?\n")
    assert told.status == piped.status == 0
    assert told.out == piped.out
    assert told.out.strip()
    assert "User:" not in told.out
    assert told.err.splitlines()[-1].startswith("prefill ")


def test_a_real_terminal(cli: Cli) -> None:
    controller, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "tokenspeed.cli.main", "chat", "--chat-template", "plain", "--ignore-eos"],
        stdin=terminal,
        stdout=terminal,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TERM": "dumb"},
        start_new_session=True,
    )
    os.close(terminal)
    seen = ""

    def read_until(mark: str) -> None:
        nonlocal seen
        while mark not in seen:
            seen += os.read(controller, 4096).decode("utf-8", "replace")

    try:
        read_until("> ")
        os.write(controller, b"/system Go on for ever.\n")
        read_until("ever.")
        seen = ""
        os.write(controller, b"Count\n")
        read_until("Count\r\n")
        seen = seen.partition("Count\r\n")[2]
        while len(seen.strip()) < 8:
            seen += os.read(controller, 4096).decode("utf-8", "replace")
        os.kill(process.pid, signal.SIGINT)
        read_until("\r\n> ")
        os.write(controller, b"\x04")
        assert process.wait(timeout=30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(controller)
