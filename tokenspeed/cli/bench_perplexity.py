"""`tokenspeed bench perplexity`: how well a model foretells a text, as llama.cpp measures it."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from tokenspeed.cli.flags import add_engine_flags, engine_settings, read_text
from tokenspeed.contracts.errors import ConfigError


def add_parser(kinds: Any) -> None:
    """Register the subcommand."""
    parser: argparse.ArgumentParser = kinds.add_parser(
        "perplexity",
        help="measure the perplexity of a text",
        description="Perplexity by the method of llama-perplexity: pieces of so many tokens, a bos in front of each, "
        "its second half scored.",
    )
    parser.add_argument("file", metavar="FILE", help="UTF-8 text, - for stdin")
    parser.add_argument("--ctx-size", type=int, default=512, metavar="N", help="tokens of a piece (default: 512)")
    parser.add_argument("--chunks", type=int, metavar="N", help="most pieces (default: all of the text)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    add_engine_flags(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Measure and print."""
    from tokenspeed.bench.perplexity import measure
    from tokenspeed.engine.llm import LLM

    if options.chunks is not None and options.chunks < 1:
        raise ConfigError(f"--chunks must be at least 1, got {options.chunks}")
    text, settings = read_text(options.file), engine_settings(options)
    with_room = {"max_model_len": options.ctx_size + 1} | settings
    llm = LLM(**with_room)
    found = None
    for found in measure(llm, text, options.ctx_size, options.chunks):
        if not options.json:
            print(f"[{found.pieces}] {found.value:.4f}", flush=True)
    assert found is not None
    print(json.dumps(asdict(found) | {"model": llm.core.files.name}) if options.json else found.text())
