"""Runs before anything imports numpy."""

from __future__ import annotations

import os

# The tests' matrices are small; BLAS threads that spin cost up to five times as long on a busy
# machine. Set it otherwise in the environment to have them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
