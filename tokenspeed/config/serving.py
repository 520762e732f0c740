"""Settings of the HTTP server, once: its flags are made of them. Each class raises ConfigError on a value that is not
usable."""

from __future__ import annotations

from dataclasses import dataclass, field

from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.settings import check, setting
from tokenspeed.contracts.errors import ConfigError
from tokenspeed.contracts.sampling import MAX_LOGPROBS, MAX_N

UVICORN_LEVELS = ("critical", "error", "warning", "info", "debug")
"""Without trace, which would write the headers of requests, and with them keys, into the log."""


@dataclass(frozen=True)
class ServerConfig:
    """Where the server listens, what its model is called, how it ends."""

    host: str = setting("127.0.0.1", "address to listen on; by default this machine alone can reach it")
    port: int = setting(8000, "port; 0 takes a free one and names it in the log", least=0, most=2**16 - 1)
    root_path: str = setting(
        "", "the path under which a proxy offers this server, as /llm: routes answer with and without it"
    )
    served_model_name: tuple[str, ...] = setting(
        (),
        "names that requests may use, the first one is answered; by default the model as given",
        spread=True,
    )
    drain_timeout: float = setting(
        30.0, "seconds that running requests get after SIGTERM", least=0, alias="--shutdown-timeout"
    )

    def __post_init__(self) -> None:
        check(self)
        path = self.root_path
        if path and (not path.startswith("/") or path.endswith("/") or "//" in path):
            raise ConfigError(f"--root-path must begin with / and not end with it, as /llm, got {path!r:.80}")
        if not all(name.strip() for name in self.served_model_name):
            raise ConfigError("--served-model-name must not be empty")


@dataclass(frozen=True)
class AccessConfig:
    """Who may use the server, and how it is reached."""

    api_key: tuple[str, ...] = setting(
        (),
        "a key that requests must bring; may be given again; other users of this machine see the command line, but "
        "neither the variable nor a file of digests",
        env="TOKENSPEED_API_KEY",
        secret=True,
    )
    api_key_file: str | None = setting(None, "a file of SHA-256 digests of keys, in hex, one a line")
    metrics_need_key: bool = setting(False, "/metrics needs a key too; by default it is open")
    cors_origin: tuple[str, ...] = setting(
        (), "an origin whose web pages may call this server, * is any; may be given again; by default none"
    )
    ssl_certfile: str | None = setting(None, "a certificate chain in PEM: serve over TLS")
    ssl_keyfile: str | None = setting(None, "its private key, where it is in a file of its own")

    def __post_init__(self) -> None:
        check(self)
        if self.ssl_keyfile is not None and self.ssl_certfile is None:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, and how many may wait."""

    max_body_bytes: int = setting(32 * 2**20, "most bytes of a request's body", least=1)
    max_choices: int = setting(1024, "most choices of one request: prompts times n", least=1)
    max_n: int = setting(128, "most samples of one prompt (n)", least=1, most=MAX_N)
    max_stop: int = setting(64, "most stop strings, and most bad words, of one request", least=0)
    max_stop_len: int = setting(1024, "most characters of a stop string or a bad word", least=1)
    max_logprobs: int = setting(
        20, "most alternatives per token (logprobs, prompt_logprobs)", least=0, most=MAX_LOGPROBS
    )
    max_queue_len: int = setting(
        1024, "sequences that may wait to be computed; while there are that many, requests get a 429", least=1
    )
    request_timeout: float | None = setting(
        None, "seconds that a request may take in all; by default there is no limit", least=0, above=True
    )

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class OperationsConfig:
    """What an operator sees and may do."""

    max_engine_restarts: int = setting(
        5, "most restarts of an engine that fails, in ten minutes; then the server stays unhealthy", least=0
    )
    engine_stuck_timeout: float = setting(
        60.0,
        "an engine with work that finishes no step for so many seconds is stuck, and restarted",
        least=0,
        above=True,
    )
    admin_key: str | None = setting(
        None,
        "what requests to /admin must carry as Authorization: Bearer KEY; without it /admin answers to this machine "
        "alone; who lists processes does not see the variable",
        env="TOKENSPEED_ADMIN_KEY",
        secret=True,
    )
    log_format: str = setting("text", "lines of the log", choices=("text", "json"))
    enable_log_requests: bool = setting(True, "log a line of figures for each prompt that ended")
    log_prompts: bool = setting(False, "and its text in it")
    uvicorn_log_level: str = setting("warning", "least level of what the HTTP library logs", choices=UVICORN_LEVELS)
    otlp_traces_endpoint: str | None = setting(
        None,
        "send a trace of each request there, as OTLP over HTTP (http://collector:4318/v1/traces); needs the extra "
        "traces",
    )
    profile_dir: str | None = setting(
        None, "a directory where POST /admin/profile writes its files; without it, it is refused"
    )

    def __post_init__(self) -> None:
        check(self)
        key = self.admin_key
        if key is not None and not (key.strip() and key.isascii() and key.isprintable()):
            raise ConfigError("--admin-key must be of printable ASCII characters and not empty")
        if key is not None and key != key.strip():
            raise ConfigError("--admin-key must have no space around it")
        if self.log_prompts and not self.enable_log_requests:
            raise ConfigError(
                "--log-prompts contradicts --no-enable-log-requests: prompts are in the lines of requests"
            )


@dataclass(frozen=True)
class ServeConfig:
    """All that `tokenspeed serve` can be told."""

    engine: EngineConfig = field(default_factory=EngineConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    access: AccessConfig = field(default_factory=AccessConfig)
    limits: Limits = field(default_factory=Limits)
    operations: OperationsConfig = field(default_factory=OperationsConfig)
