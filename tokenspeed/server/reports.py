"""Bodies of /health and /version."""

from __future__ import annotations

from typing import Literal

import msgspec


class HealthReport(msgspec.Struct, kw_only=True):
    """status: "ok" with a 200, "unavailable" with a 503."""

    status: Literal["ok", "unavailable"]
    reason: str


class Version(msgspec.Struct, kw_only=True):
    """Of TokenSpeed."""

    version: str
