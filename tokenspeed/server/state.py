"""What all routes share: the engine with its phases, the names it is served under, the metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tokenspeed.config.serving import Limits
from tokenspeed.contracts.errors import ConfigError, ParameterError, TokenSpeedError
from tokenspeed.server.access import Access
from tokenspeed.server.engine import Engine, StartEngine
from tokenspeed.server.errors import ApiError
from tokenspeed.server.limits import Admission
from tokenspeed.server.metrics import ServerMetrics
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
    draining: bool = False
    limits: Limits = field(default_factory=Limits)
    access: Access = field(default_factory=Access)
    created: int = field(default_factory=lambda: int(time.time()))
    _progress: tuple[int, int] = (0, 0)
    _chat_template: ChatTemplate | None = None
    _no_template: str = ""

    def __post_init__(self) -> None:
        self.admission = Admission(self.limits)

    async def load(self, start: StartEngine) -> None:
        """Start the engine. Raises what it raises, and ConfigError for a chat template that cannot be used."""
        engine = await start(self._report)
        try:
            self._find_template(engine.tokenizer)
        except TokenSpeedError:
            await engine.close()
            raise
        self.names = self.names or (engine.info.model,)
        self.metrics.serve(self.names[0], engine.stats)
        self.engine = engine

    def ready(self, model: str | None = None) -> Engine:
        """The engine, for a request that names `model`. Raises ApiError: 503 while there is none, 404 for a name that
        is not served."""
        if self.draining:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
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
        if self.engine is None:
            return False, self.loading()
        health = self.engine.health()
        return health.ok, health.reason or "ok"

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ParameterError for a model that has none."""
        tokenizer = self.engine.tokenizer if self.engine else None
        if tokenizer is None:
            raise ParameterError(_NO_TOKENIZER)
        return tokenizer

    @property
    def chat_template(self) -> ChatTemplate:
        """Raises ParameterError, with the hint, for a model without one."""
        if self._chat_template is None:
            raise ParameterError(self._no_template)
        return self._chat_template

    def _report(self, done: int, total: int) -> None:
        self._progress = (done, total)

    def _find_template(self, tokenizer: Tokenizer | None) -> None:
        if tokenizer is None:
            self._no_template = _NO_TOKENIZER
        elif self.chat_template_argument is not None:
            self._chat_template = load_chat_template(tokenizer, self.chat_template_argument)
        else:
            try:
                self._chat_template = load_chat_template(tokenizer)
            except ConfigError as error:
                self._no_template = str(error)
