"""Shared memory and processes that die: the kernel and the server free what they held."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import octavo_client as oc
from tests.e2e.test_process import server_process
from tests.rpc.test_shared_memory import held_regions
from tests.waiting import wait_until

FLAGS = ("--backend", "reference", "--shared-memory", "true")

CLIENT = textwrap.dedent("""
    import sys
    import numpy as np
    from octavo_client import Client, Retry

    q, k, v = (np.ones((64, heads, 64), np.float16) for heads in (8, 2, 2))
    client = Client(sys.argv[1], shared_memory=True, retry=Retry(max_attempts=2))
    session = client.open_session("tiny")
    kept = session.decode(0, q, k, v)
    while True:
        kept = session.decode(0, q)
        print("decoding", client._memory._region is not None, flush=True)
""")


@contextmanager
def decoding_client(address: str) -> Iterator[subprocess.Popen[str]]:
    """Run a client that decodes in shared memory, step after step."""
    command = [sys.executable, "-c", CLIENT, address]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        try:
            assert it.stdout is not None
            for line in it.stdout:
                if line == "decoding True\n":
                    break
            yield it
        finally:
            it.kill()


def shared_files() -> set[str]:
    return {path.name for path in Path("/dev/shm").iterdir()}


def test_a_killed_client_leaves_nothing() -> None:
    before = shared_files()
    with server_process(*FLAGS) as (server, address):
        for _ in range(2):
            with decoding_client(address):
                assert len(held_regions(server.pid)) == 3  # the mapping, and its two descriptors
            wait_until(lambda: held_regions(server.pid) == [])
        with oc.Client(address) as client:
            assert client.server_info().num_sessions == 2
    assert shared_files() == before


def test_a_killed_server_leaves_nothing() -> None:
    before = shared_files()
    with server_process(*FLAGS) as (server, address), decoding_client(address) as client:
        assert held_regions(client.pid)
        server.kill()
        assert client.wait(60) != 0
        assert client.stderr is not None
        assert "ConnectionLost" in client.stderr.read()
    assert shared_files() == before
