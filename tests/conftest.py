"""Runs before anything imports numpy."""

from __future__ import annotations

import os

# The tests' matrices are small; BLAS threads that spin cost up to five times as long on a busy
# machine. Set it otherwise in the environment to have them.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# A CI system may force a terminal on every program; the demo would then move its cursor where the tests read lines.
for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)

# The servers are on this machine; a proxy that the environment names for gRPC is not on the way to them.
os.environ["no_grpc_proxy"] = "127.0.0.1,localhost"  # noqa: SIM112 (gRPC reads it so)
