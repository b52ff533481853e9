"""The servers that are measured, each in a process of its own, and the handle on such a process.

    python -m tests.bench.rpc.serve KIND

prints {"port": N, "socket": PATH}, the path empty where there is none; then it answers each line on stdin with what it
used and counted so far, and ends with stdin.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, Literal, NamedTuple, get_args
from unittest import mock

from octavo_server import server as server_module
from octavo_server.backends.base import Backend
from octavo_server.config_keys import ModelConfig, ServerConfig
from octavo_server.model import ModelSpec, default_sm_scale
from octavo_server.server import Server, settle_memory
from tests.bench.rpc.echo import MAX_MESSAGE_BYTES, serve_asyncio, serve_sync
from tests.bench.rpc.null_backend import CountingBackend, NullBackend
from tests.bench.shapes import LLAMA

Kind = Literal["echo", "echo-asyncio", "octavo-null", "octavo-cpu"]

MODEL = "llama"
ADDRESS = "127.0.0.1:0"
MAX_STREAMS = 128
MAX_SESSIONS = 20_000
MAX_CONTEXT = 1 << 20
NULL_BLOCKS = 1 << 19
"""Of a pool that takes no memory."""

CPU_BLOCKS = 64 * 4608 // 32
"""64 sessions of 4,096 tokens, and room for the steps."""


class Usage(NamedTuple):
    """What a server process used and counted since its start."""

    cpu_s: float
    num_launches: int
    num_entries: int


class Process:
    """A running server.

    Attributes:
        target: Its address.
        unix_target: Its Unix socket, where it has one.
    """

    def __init__(self, kind: Kind) -> None:
        command = [sys.executable, "-m", "tests.bench.rpc.serve", kind]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        listening = self._read()
        self.target = f"127.0.0.1:{listening['port']}"
        self.unix_target = f"unix:{listening['socket']}"

    def usage(self) -> Usage:
        """Return what the process used so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("usage\n")
        self._process.stdin.flush()
        return Usage(**self._read())

    def stop(self) -> None:
        """End the process."""
        with self._process as process:  # closes its pipes and waits for it
            assert process.stdin is not None
            process.stdin.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("a server of the benchmark ended at once; its error is above")
        answer: dict[str, Any] = json.loads(line)
        return answer


@contextmanager
def serving(kind: Kind) -> Iterator[Process]:
    """Run a server for a while."""
    process = Process(kind)
    try:
        yield process
    finally:
        process.stop()


def main() -> None:
    """Serve until stdin ends."""
    kind = sys.argv[1]
    assert kind in get_args(Kind), f"KIND is one of {get_args(Kind)}"
    backend = CountingBackend(_cpu_backend() if kind == "octavo-cpu" else NullBackend())
    with TemporaryDirectory() as folder:
        if kind == "echo-asyncio":
            run = partial(serve_asyncio, ADDRESS, _say_where)
            threading.Thread(target=run, daemon=True).start()
        elif kind == "echo":
            _server, port = serve_sync(ADDRESS, MAX_STREAMS)
            _say_where(port)
        else:
            path = f"{folder}/octavo.sock"
            _say_where(_serve_octavo(backend, path), path)
        for _ in sys.stdin:
            usage = Usage(time.process_time(), backend.num_launches, backend.num_entries)
            _say(**usage._asdict())


def _say_where(port: int, path: str = "") -> None:
    _say(port=port, socket=path)


def _cpu_backend() -> Backend:
    from octavo_server.backends.cpu import CpuBackend  # noqa: PLC0415

    return CpuBackend()


def _serve_octavo(backend: CountingBackend, unix_socket: str) -> int:
    is_null = backend.name == "null"
    spec = ModelSpec(
        name=MODEL,
        num_layers=1,
        num_q_heads=LLAMA.num_q_heads,
        num_kv_heads=LLAMA.num_kv_heads,
        head_dim=LLAMA.head_dim,
        block_size=32,
        max_context=MAX_CONTEXT,
        sm_scale=(default_sm_scale(LLAMA.head_dim),),
        window=(0,),
        soft_cap=(0.0,),
    )
    config = ServerConfig(
        port=0,
        max_sessions=MAX_SESSIONS,
        max_streams=MAX_STREAMS,
        max_message_bytes=MAX_MESSAGE_BYTES,
        unix_socket=unix_socket,
        shared_memory=True,
        models=(ModelConfig(spec, num_blocks=NULL_BLOCKS if is_null else CPU_BLOCKS),),
    )
    # The server's own way to a backend, with this one at its end.
    with mock.patch.object(server_module, "create_backend", return_value=backend):
        server = Server(config)
    settle_memory()
    return server.start()


def _say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
