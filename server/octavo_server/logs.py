"""Logs of the server, to stderr: one readable line each, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time

PACKAGE = "octavo_server"
_FORMAT = "%(asctime)s.%(msecs)03dZ %(levelname)-7s %(name)s: %(message)s"
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S"

GRPC_VERBOSITY = {"text": "ERROR", "json": "NONE"}
"""What gRPC's core, which writes to stderr by itself, may say. Unasked it says every failed handshake, so every scan of
the port, and none of its lines is JSON."""

_RECORD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}


def setup_logs(level: str, log_format: str = "text") -> None:
    """Send logs to stderr: the server's own from `level` on, those of libraries from warnings on.

    Call it before gRPC is imported, for its core reads GRPC_VERBOSITY then. One that is set already stays.

    Args:
        level: "debug", "info", "warning" or "error".
        log_format: "text" or "json".
    """
    os.environ.setdefault("GRPC_VERBOSITY", GRPC_VERBOSITY[log_format])
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else _text_formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger(PACKAGE).setLevel(level.upper())


class Throttle:
    """Lets so many lines through in each second, and counts the others: no client may fill the disk.

    Args:
        log: Told how many were stopped.
        what: The lines' subject, in the plural.
    """

    def __init__(self, log: logging.Logger, what: str) -> None:
        self._log = log
        self._what = what
        self._lock = threading.Lock()
        self._second = 0
        self._num_passed = 0
        self._num_stopped = 0

    def passes(self, max_lines_a_s: int, now: float) -> bool:
        """Return whether one may pass; the first of a second says how many were stopped before."""
        with self._lock:
            if int(now) != self._second:
                self._second, self._num_passed = int(now), 0
                num_stopped, self._num_stopped = self._num_stopped, 0
                if num_stopped:
                    self._log.info("%d further %s were not logged", num_stopped, self._what)
            self._num_passed += 1
            passes = self._num_passed <= max_lines_a_s
            self._num_stopped += not passes
            return passes


def _text_formatter() -> logging.Formatter:
    formatter = logging.Formatter(_FORMAT, _TIME_FORMAT)
    formatter.converter = time.gmtime
    return formatter


class JsonFormatter(logging.Formatter):
    """Writes a record as one JSON object: time, level, logger, message, what `extra` gave, and its exception."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        seconds = time.strftime(_TIME_FORMAT, time.gmtime(record.created))
        line: dict[str, object] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _RECORD_FIELDS:
                line.setdefault(name, value)
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)
