"""A seed that is new in every run, and the same in every pytest-xdist worker of a run (they must collect equal ids)."""

import os
import secrets
import zlib

SEED = zlib.crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", secrets.token_hex()).encode())
