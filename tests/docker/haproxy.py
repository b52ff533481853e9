"""Finds HAProxy, and runs it with the project's configuration in front of servers on loopback."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import wait_until

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "docker" / "haproxy" / "haproxy.cfg"
UNPACKED = ROOT / "build" / "haproxy"

_PACKAGES = (
    "haproxy",
    "liblua5.3-0",
    "libopentracing-c-wrapper0",
    "libopentracing1",
    "libpcre2-8-0",
)
"""Debian's package, and those of its libraries that a small system lacks."""


class NoHaproxyError(Exception):
    """There is no HAProxy, and none can be had; the text says why."""


@dataclass(frozen=True, slots=True)
class Haproxy:
    """A HAProxy that runs here.

    Attributes:
        program: Its path.
        libraries: Folder of its libraries, None when the system has them.
    """

    program: Path
    libraries: Path | None = None

    def variables(self, changes: Mapping[str, str]) -> dict[str, str]:
        """Return the environment of a process."""
        libraries = {} if self.libraries is None else {"LD_LIBRARY_PATH": str(self.libraries)}
        return {**os.environ, **libraries, **changes}

    def check(self, configs: Sequence[Path], changes: Mapping[str, str]) -> str:
        """Let HAProxy check a configuration; return what it says against it, nothing when all is well."""
        done = subprocess.run(
            [str(self.program), "-c", *_files(configs)],
            env=self.variables(changes),
            capture_output=True,
            text=True,
            check=False,
        )
        said = [
            line for line in done.stderr.splitlines() if line.startswith(("[ALERT]", "[WARNING]"))
        ]
        # Names of a cluster are not known here, and the servers are then without an address for now.
        return "\n".join(line for line in said if "could not resolve address" not in line)


def find_haproxy() -> Haproxy:
    """Return the system's HAProxy, else Debian's package unpacked into build/, which takes no root.

    Raises:
        NoHaproxyError: There is neither.
    """
    path = os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"])
    if program := shutil.which("haproxy", path=path):
        return Haproxy(Path(program))
    unpacked = UNPACKED / "usr" / "sbin" / "haproxy"
    if not unpacked.exists():
        _unpack()
    (libraries,) = UNPACKED.glob("usr/lib/*-linux-gnu")
    return Haproxy(unpacked, libraries)


def _unpack() -> None:
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise NoHaproxyError("there is no haproxy on PATH, and no apt-get to download Debian's")
    folder = UNPACKED.with_name(f"{UNPACKED.name}-{os.getpid()}")
    folder.mkdir(parents=True, exist_ok=True)
    try:
        _run(["apt-get", "download", *_PACKAGES], folder)
        for package in sorted(folder.glob("*.deb")):
            _run(["dpkg", "-x", package.name, "."], folder)
            package.unlink()
        folder.rename(UNPACKED)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise NoHaproxyError(f"there is no haproxy on PATH, and {command[:2]}: {done.stderr}")


@dataclass(frozen=True, slots=True)
class Backend:
    """A server as the proxy knows it.

    Attributes:
        name: Its name in metrics.
        port: On 127.0.0.1, of the calls.
        health_port: On 127.0.0.1, of health.
    """

    name: str
    port: int
    health_port: int


@dataclass(frozen=True, slots=True)
class Proxy:
    """A running proxy.

    Attributes:
        address: Where clients connect.
        monitor: Where it is watched.
        process: Its process.
    """

    address: str
    monitor: str
    process: subprocess.Popen[str]

    def metrics(self) -> str:
        """Return its metrics in Prometheus' text format."""
        with urllib.request.urlopen(f"http://{self.monitor}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    def is_up(self, name: str) -> bool:
        """Whether routes go to a server."""
        line = f'haproxy_server_status{{proxy="octavo",server="{name}",state="UP"}} 1'
        return line in self.metrics()

    def has_checked(self, name: str) -> bool:
        """Whether a server passed a check, rather than being taken for well at the start."""
        line = f'haproxy_server_check_status{{proxy="octavo",server="{name}",state="L7OK"}} 1'
        return line in self.metrics()

    def is_ready(self) -> bool:
        """What Kubernetes' probe sees: whether there is a server at all."""
        try:
            urllib.request.urlopen(f"http://{self.monitor}/ready", timeout=10).close()
        except urllib.error.HTTPError:
            return False
        return True


@contextmanager
def proxying(
    haproxy: Haproxy, folder: Path, backends: Sequence[Backend], **variables: str
) -> Iterator[Proxy]:
    """Run a proxy in front of servers that checks their health quickly."""
    (folder / "servers.cfg").write_text(_server_list(backends))
    with running(haproxy, folder, variables) as proxy:
        yield proxy


@contextmanager
def running(
    haproxy: Haproxy, folder: Path, variables: Mapping[str, str], within: Sequence[str] = ()
) -> Iterator[Proxy]:
    """Run a proxy with the servers.cfg of a folder; `within` is a command that runs it."""
    with ExitStack() as sockets:
        address, monitor = (sockets.enter_context(_free_address()) for _ in range(2))
    command = [*within, str(haproxy.program), "-db", *_files([CONFIG, folder / "servers.cfg"])]
    settings = {
        "OCTAVO_PROXY_LISTEN": address,
        "OCTAVO_PROXY_MONITOR": monitor,
        "OCTAVO_PROXY_CHECK_INTERVAL": "100ms",
        "OCTAVO_PROXY_CHECK_FALL": "3",
        **variables,
    }
    with (
        (folder / "haproxy.log").open("w") as log,
        subprocess.Popen(
            command, env=haproxy.variables(settings), stdout=log, stderr=log, text=True
        ) as process,
    ):
        try:
            proxy = Proxy(address, monitor, process)
            wait_until(lambda: _answers(proxy))
            yield proxy
        finally:
            process.kill()


def _answers(proxy: Proxy) -> bool:
    assert proxy.process.poll() is None, "HAProxy ended"
    try:
        proxy.metrics()
    except OSError:
        return False
    return True


def _server_list(backends: Sequence[Backend]) -> str:
    lines = [
        f"    server {backend.name} 127.0.0.1:{backend.port} id {index} port {backend.health_port}"
        for index, backend in enumerate(backends, 1)
    ]
    return "\n".join(["backend octavo from octavo", *lines, ""])


def _files(configs: Sequence[Path]) -> list[str]:
    return [part for path in configs for part in ("-f", str(path))]


@contextmanager
def _free_address() -> Iterator[str]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"
