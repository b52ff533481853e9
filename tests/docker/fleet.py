"""Several octavo-server processes on loopback."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO

from octavo_client import Client
from tests.docker.haproxy import Backend

MODEL = (
    "name=tiny,num_layers=2,num_q_heads=4,num_kv_heads=2,head_dim=16,max_context=256,num_blocks=64"
)


class ServerProcess:
    """One server; it can be killed and started again where it was.

    Attributes:
        backend: How a proxy reaches it, once it listened.
    """

    def __init__(self, name: str, snapshots: Path) -> None:
        self._name = name
        self._snapshots = snapshots
        self.backend = Backend(name, 0, 0)
        self._process = self._start()

    def wait_until_listening(self) -> None:
        """Read the ports from the lines that it prints."""
        assert self._process.stdout is not None
        port = _port_of(self._process.stdout, "listening on ")
        self.backend = Backend(self._name, port, _port_of(self._process.stdout, "health on "))

    def kill(self) -> None:
        """End it as if its machine had failed."""
        if self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    def terminate(self) -> None:
        """End it as a rolling restart does: it finishes its work, and writes its sessions."""
        self._process.terminate()
        self._process.communicate()
        assert self._process.returncode == 0

    def restart(self) -> None:
        """Start it again on its ports."""
        self._process = self._start()
        self.wait_until_listening()

    def _start(self) -> subprocess.Popen[str]:
        flags = {
            "--model": MODEL,
            "--backend": "reference",
            "--port": str(self.backend.port),
            "--snapshot-dir": str(self._snapshots),
            "--health-address": f"127.0.0.1:{self.backend.health_port}",
        }
        command = [sys.executable, "-m", "octavo_server", "serve"]
        return subprocess.Popen(
            [*command, *(part for flag in flags.items() for part in flag)],
            stdout=subprocess.PIPE,
            text=True,
        )


def _port_of(lines: IO[str], start: str) -> int:
    line = lines.readline()
    assert line.startswith(f"{start}127.0.0.1:"), line
    return int(line.rpartition(":")[2])


@contextmanager
def fleet(num_servers: int, volumes: Path) -> Iterator[Sequence[ServerProcess]]:
    """Run servers, which start together; each has a folder of `volumes` for its snapshots."""
    with ExitStack() as stack:
        servers = []
        for idx in range(num_servers):
            name = f"octavo-{idx}"
            servers.append(ServerProcess(name, volumes / name))
            stack.callback(servers[-1].kill)
        for server in servers:
            server.wait_until_listening()
        yield servers


def server_of(address: str, route: str) -> str:
    """Return the incarnation that a new client with a route reaches."""
    with Client(address, route=route) as client:
        return client.server_info().incarnation
