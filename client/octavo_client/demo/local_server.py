"""A server of the demo's model on loopback, as a process of its own that ends with the demo."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from tempfile import TemporaryFile
from typing import IO

from octavo_client.demo.model import ModelConfig

__all__ = ["ServerStartError", "local_server", "model_flag"]

BLOCK_SIZE = 32
START_TIMEOUT_S = 600.0  # the first start compiles the kernels
STOP_TIMEOUT_S = 15.0
_POLL_S = 0.1
_TAIL_BYTES = 4000
_LOG_PREFIX = re.compile(r"^\S+Z \w+ +[\w.]+: ")
_LISTENING = re.compile(r"^listening on (\S+)$", re.MULTILINE)


class ServerStartError(Exception):
    """The server did not start; the text says why."""


def model_flag(name: str, config: ModelConfig, num_seqs: int) -> str:
    """Return what `octavo-server serve --model` takes for a model with room for `num_seqs` full sequences."""
    keys = {
        "name": name,
        "num_layers": config.num_layers,
        "num_q_heads": config.num_q_heads,
        "num_kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "max_context": config.max_context,
        "block_size": BLOCK_SIZE,
        "num_blocks": num_seqs * -(-config.max_context // BLOCK_SIZE),
    }
    return ",".join(f"{key}={value}" for key, value in keys.items())


@contextmanager
def local_server(flags: Sequence[str], on_wait: Callable[[str], object]) -> Iterator[str]:
    """Run `octavo-server serve` on a free loopback port; SIGTERM ends it.

    Args:
        flags: Flags of `serve` besides the address.
        on_wait: Called several times a second until it listens, with the text of its last log line.

    Yields:
        Its address, "host:port".

    Raises:
        ServerStartError: It did not start.
    """
    command = [sys.executable, "-m", "octavo_server", "serve", "--host", "127.0.0.1", "--port", "0"]
    # Files rather than pipes: nobody has to drain them. A process group of its own: Ctrl-C is for the demo,
    # which then ends the server.
    with TemporaryFile() as out, TemporaryFile() as log:
        process = subprocess.Popen(
            [*command, *flags],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=log,
            process_group=0,
        )
        try:
            yield _wait_for_address(process, out, log, on_wait)
        finally:
            _stop(process)


def _wait_for_address(
    process: subprocess.Popen[bytes],
    out: IO[bytes],
    log: IO[bytes],
    on_wait: Callable[[str], object],
) -> str:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        listening = _LISTENING.search(_tail(out))
        if listening:
            return listening[1]
        log_tail = _tail(log).strip()
        if process.poll() is not None:
            raise ServerStartError(
                f"the server ended with exit code {process.returncode}:\n{log_tail}{_hint(log_tail)}"
            )
        on_wait(_LOG_PREFIX.sub("", log_tail.rpartition("\n")[2]))
        time.sleep(_POLL_S)
    raise ServerStartError(f"the server did not start in {START_TIMEOUT_S:.0f} s:\n{_tail(log)}")


def _hint(log_tail: str) -> str:
    missing = re.search(r"No module named '?([\w.]+)", log_tail)
    return f'\n{missing[1]} is missing: pip install "octavo[server]"' if missing else ""


def _tail(file: IO[bytes]) -> str:
    """Return the end of a file that another process writes, without moving the position that they share."""
    size = os.fstat(file.fileno()).st_size
    start = max(0, size - _TAIL_BYTES)
    return os.pread(file.fileno(), _TAIL_BYTES, start).decode(errors="replace")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    finally:
        # What is left of its group: itself when it hangs, its compilers when it was still building.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
