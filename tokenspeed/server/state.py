"""What all routes share: the engine with its phases, the names it is served under, the metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tokenspeed.config.serving import Limits
from tokenspeed.contracts.errors import ConfigError, ParameterError, TokenSpeedError
from tokenspeed.parsing.formats import reply_format
from tokenspeed.parsing.reply import ReplyFormat
from tokenspeed.server.access import Access
from tokenspeed.server.engine import Engine, StartEngine
from tokenspeed.server.errors import ApiError
from tokenspeed.server.limits import Admission
from tokenspeed.server.metrics import ServerMetrics
from tokenspeed.server.outage import Outage
from tokenspeed.tokenizer.base import Tokenizer
from tokenspeed.tokenizer.chat import ChatTemplate, load_chat_template

_NO_TOKENIZER = "this model has no tokenizer: use /v1/completions with token ids"


@dataclass
class ServerState:
    """One model behind one server. `names`: what requests may call it; by default the engine's own name for it."""

    names: Sequence[str] = ()
    chat_template_argument: str | None = None
    metrics: ServerMetrics = field(default_factory=ServerMetrics)
    engine: Engine | None = None
    outage: Outage | None = None
    """Since an engine failed, until another is loaded."""
    draining: bool = False
    admin_key: str | None = field(default=None, repr=False)
    """What /admin wants to be told; without one it answers to this machine alone."""
    profile_dir: Path | None = None
    """Where /admin/profile writes; without it there are none."""
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    root_path: str = ""
    """Under which a proxy offers the server."""
    created: int = field(default_factory=lambda: int(time.time()))
    reply_format: ReplyFormat | None = None
    """Of a model whose replies are taken apart: it is its template, too, where no other was asked for."""
    _progress: tuple[int, int] = (0, 0)
    _chat_template: ChatTemplate | None = None
    _no_template: str = ""

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits)

    async def load(self, start: StartEngine) -> None:
        """Start the engine. Raises what it raises, and ConfigError for a chat template that cannot be used."""
        self._progress = (0, 0)
        engine = await start(self._report)
        try:
            self._find_template(engine.tokenizer)
        except TokenSpeedError:
            await engine.close()
            raise
        self.names = self.names or (engine.info.model,)
        self.metrics.serve(self.names[0], engine.stats, engine.step_times)
        self.engine, self.outage = engine, None

    def lose_engine(self, outage: Outage) -> None:
        """The engine has failed: from now on requests are told of the outage."""
        self.outage = outage
        self.metrics.engine_ended()

    def ready(self, model: str | None = None) -> Engine:
        """The engine, for a request that names `model`. Raises ApiError: 503 while there is none, 404 for a name that
        is not served."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self.outage is not None:
            raise ApiError(503, self.outage.text(self.loading()), code=_outage_code(self.outage))
        if self.engine is None:
            raise ApiError(503, self.loading(), code="loading")
        if model is not None and model not in self.names:
            known = ", ".join(self.names)
            raise ApiError(404, f"no model {model!r} here (served: {known})", "model", "model_not_found")
        return self.engine

    def loading(self) -> str:
        """How far the load is, in words."""
        done, total = self._progress
        return f"loading the model: {done / total:.0%}" if total else "loading the model"

    def health(self) -> tuple[bool, str]:
        """Whether requests are served, and "ok" or the reason why not."""
        if self.draining:
            return False, "shutting down"
        if self.outage is not None:
            return False, self.outage.text(self.loading())
        if self.engine is None:
            return False, self.loading()
        health = self.engine.health()
        return health.ok, health.reason or "ok"

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ParameterError for a model that has none, and ApiError as `ready`: an engine may be lost while a
        request is read."""
        tokenizer = self.ready().tokenizer
        if tokenizer is None:
            raise ParameterError(_NO_TOKENIZER)
        return tokenizer

    @property
    def chat_template(self) -> ChatTemplate | ReplyFormat:
        """Raises ParameterError, with the hint, for a model without one."""
        if self.reply_format is not None:
            return self.reply_format
        if self._chat_template is None:
            raise ParameterError(self._no_template)
        return self._chat_template

    def prompt_text(self, token_ids: list[int]) -> str:
        """A prompt in words, or its ids where there is no tokenizer any more."""
        tokenizer = self.engine.tokenizer if self.engine is not None else None
        return str(token_ids) if tokenizer is None else tokenizer.decode(token_ids, skip_special_tokens=False)

    def _report(self, done: int, total: int) -> None:
        self._progress = (done, total)

    def _find_template(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None:
            self._no_template = _NO_TOKENIZER
        elif self.chat_template_argument is not None:
            self._chat_template = load_chat_template(tokenizer, self.chat_template_argument)
        elif (found := reply_format(tokenizer)) is not None:
            self.reply_format = found
        else:
            try:
                self._chat_template = load_chat_template(tokenizer)
            except ConfigError as error:
                self._no_template = str(error)


def _outage_code(outage: Outage) -> str:
    return "engine_dead" if outage.final else "restarting"
