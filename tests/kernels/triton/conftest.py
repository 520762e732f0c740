"""Kernels run in triton's interpreter here; what is compiled is compiled in child processes."""

import os

os.environ["TRITON_INTERPRET"] = "1"
