"""Logs of the server: one readable line each, to stderr."""

from __future__ import annotations

import logging
import sys
import time

PACKAGE = "octavo_server"
_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s"
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"


def setup_logs(level: str) -> None:
    """Send logs to stderr: the server's own from `level` on, those of libraries from warnings on.

    Args:
        level: "debug", "info", "warning" or "error".
    """
    formatter = logging.Formatter(_FORMAT, _TIME_FORMAT)
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(PACKAGE).setLevel(level.upper())
