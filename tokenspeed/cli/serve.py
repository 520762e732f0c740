"""`tokenspeed serve`: the model behind an HTTP server that OpenAI's clients know."""

from __future__ import annotations

import argparse
import itertools
from typing import Any

from tokenspeed.cli.flags import add_config_flag, add_settings, given_settings
from tokenspeed.config.engine import EngineConfig
from tokenspeed.config.serving import AccessConfig, Limits, OperationsConfig, ServeConfig, ServerConfig
from tokenspeed.config.settings import settings_of
from tokenspeed.contracts.errors import ConfigError

SECTIONS: dict[str, type] = {
    "server": ServerConfig,
    "access": AccessConfig,
    "limits": Limits,
    "operations": OperationsConfig,
    "engine": EngineConfig,
}
"""Groups of flags, as fields of ServeConfig."""


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "serve",
        help="serve a model over HTTP",
        description="Serve a model with OpenAI's endpoints: /v1/completions, /v1/chat/completions, /v1/embeddings, "
        "/v1/models; with /v1/score and /v1/rerank; and /health, /metrics, /version, /admin. SIGTERM finishes what "
        "runs, then ends. Without a model: Gemma 3 270M.",
    )
    parser.add_argument("model_argument", nargs="?", metavar="MODEL", help="the same as --model")
    add_config_flag(parser)
    for title, settings in SECTIONS.items():
        add_settings(parser, title, settings)
    parser.set_defaults(run=run)


def serve_config(options: argparse.Namespace) -> ServeConfig:
    """What was given on the command line, in a file and in the environment. Raises ConfigError."""
    named, flagged = options.model_argument, vars(options).get("model")
    if named is not None and flagged is not None and named != flagged:
        raise ConfigError(f"two models: {named} and --model {flagged}")
    known = {title: settings_of(settings) for title, settings in SECTIONS.items()}
    given = given_settings(options, tuple(itertools.chain(*known.values())))
    if named is not None:
        given["model"] = named
    made = {
        title: SECTIONS[title](**{each.name: given[each.name] for each in settings if each.name in given})
        for title, settings in known.items()
    }
    return ServeConfig(**made)


def run(options: argparse.Namespace) -> None:
    """Listen, load, serve."""
    config = serve_config(options)
    from tokenspeed.server.serve import serve

    serve(config)
