"""`octavo-server serve` as a process that a test may end and start again on the same port and folder."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

WAIT_S = 60


class ServerProcess:
    """One server after the other on one port.

    Args:
        flags: Of `serve`, without the port; those of `start` go along.

    Attributes:
        target: For a client.
    """

    def __init__(self, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        self.target = f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "octavo_server", "serve", "--port", str(port)]
        self._command = [*command, *flags]
        self._process: subprocess.Popen[str] | None = None
        self._logs = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it lives as long as the object

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(self, *exc_info: object) -> None:
        if self._process is not None:
            self.kill()
        self._logs.close()

    def start(self, *flags: str, prefix: tuple[str, ...] = ()) -> None:
        """Start a server and wait until it serves."""
        command = [*prefix, *self._command, *flags]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=self._logs, text=True
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line.startswith("listening on"), self.logs()

    def terminate(self) -> int:
        """Send SIGTERM and return the exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._reap()

    def kill(self) -> int:
        """Send SIGKILL and return the exit code."""
        assert self._process is not None
        self._process.kill()
        return self._reap()

    def run_to_end(self, *flags: str) -> int:
        """Start a server that will not serve and return its exit code."""
        command = [*self._command, *flags]
        done = subprocess.run(command, stderr=self._logs, timeout=WAIT_S, check=False)
        return done.returncode

    def logs(self) -> str:
        """Return the logs of all servers so far."""
        self._logs.flush()
        return Path(f"/proc/self/fd/{self._logs.fileno()}").read_text(encoding="utf-8")

    def _reap(self) -> int:
        assert self._process is not None
        with self._process as process:
            return process.wait(WAIT_S)
