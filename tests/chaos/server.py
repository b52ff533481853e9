"""The server under test: a real process, killed and started again on the same port."""

from __future__ import annotations

import contextlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

START_TIMEOUT_S = 300.0
"""The first start may compile the kernels."""

STOP_TIMEOUT_S = 90.0
_LISTENING = "listening on "
"""Before the address, on a line of its own."""


class ServerFailure(Exception):  # noqa: N818 - says what happened
    """The server did what no fault explains; the text says what."""


class ServerProcess:
    """Runs `octavo-server serve`, one process after the other; one caller at a time.

    Args:
        flags: Of `serve`, besides the port.
        log: Where all output goes; what is there is replaced.

    Attributes:
        address: "host:port"; the same for all processes.
    """

    def __init__(self, flags: Sequence[str], log: Path) -> None:
        self._flags = list(flags)
        self._log = log
        self._log.write_text("")
        self._process: subprocess.Popen[str] | None = None
        self._is_expected_to_run = False
        self.address = ""

    def start(self, *extra_flags: str) -> None:
        """Start a process and wait until it listens.

        Raises:
            ServerFailure: It does not.
        """
        lines = self._spawn(extra_flags)
        self.address = _wait_for(_LISTENING, lines)[1].strip()
        self._is_expected_to_run = True

    def start_in_vain(self, text: str, delay_s: float, *extra_flags: str) -> None:
        """Start a process and kill it some time after a line of its log has `text`.

        Raises:
            ServerFailure: There is no such line.
        """
        lines = self._spawn(extra_flags)
        _wait_for(text, lines)
        time.sleep(delay_s)
        self.end(signal.SIGKILL)

    def _spawn(self, extra_flags: Sequence[str]) -> queue.SimpleQueue[str]:
        """Start a process; return its output line by line, "" at the end."""
        port = self.address.rpartition(":")[2] or "0"
        command = [sys.executable, "-m", "octavo_server", "serve", "--port", port]
        process = subprocess.Popen(
            [*command, *self._flags, *extra_flags],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            process_group=0,  # Ctrl-C is for the run, which then ends the server
        )
        self._process = process
        lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._read, args=(process, lines), daemon=True).start()
        return lines

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._running.pid

    def died(self) -> int | None:
        """Return the exit code of a process that nobody ended."""
        return self._process.poll() if self._process and self._is_expected_to_run else None

    def send(self, number: signal.Signals) -> None:
        """Send a signal, which may end the process."""
        if number in (signal.SIGTERM, signal.SIGKILL):
            self._is_expected_to_run = False
        self._running.send_signal(number)

    def end(self, number: signal.Signals) -> int:
        """End the process by a signal and return its exit code.

        Raises:
            ServerFailure: It does not end.
        """
        self.send(number)
        try:
            return self._running.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._running.kill()
            self._running.wait()
            raise ServerFailure(
                f"the server did not end {STOP_TIMEOUT_S:g} s after {number.name}"
            ) from None

    def close(self) -> None:
        """Kill what still runs."""
        self._is_expected_to_run = False
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    @property
    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            raise ServerFailure("the server was never started")
        return self._process

    def _read(self, process: subprocess.Popen[str], lines: queue.SimpleQueue[str]) -> None:
        assert process.stdout is not None
        with self._log.open("a") as log, process.stdout:
            for line in process.stdout:
                log.write(line)
                log.flush()
                lines.put(line)
        lines.put("")


def _wait_for(text: str, lines: queue.SimpleQueue[str]) -> tuple[str, str]:
    """Wait for a line that has `text`; return what stands before and behind it."""
    deadline = time.monotonic() + START_TIMEOUT_S
    seen: list[str] = []
    with contextlib.suppress(queue.Empty):
        while line := lines.get(timeout=max(deadline - time.monotonic(), 0)):
            before, found, behind = line.partition(text)
            if found:
                return before, behind
            seen.append(line)
    raise ServerFailure(f"the server did not say {text!r}:\n{''.join(seen[-20:])}")
