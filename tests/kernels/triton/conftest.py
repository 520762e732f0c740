"""Everything here runs in Triton's interpreter; what compiles does so in a child process without it."""

from __future__ import annotations

from tests.kernels.triton import interpreter  # noqa: F401
