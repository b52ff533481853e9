"""The example of pipelines, run as a user runs it, and its proxy."""

from __future__ import annotations

import re
import socket
import time

import pytest

from octavo_client.examples.delay_proxy import delay_proxy
from octavo_client.examples.pipelining import main

QUICK = ["--sessions", "4", "--context", "16", "--layers", "2", "--tokens", "2", "--rounds", "2"]


@pytest.mark.parametrize(
    "arguments", [["--layer-us", "100", "--delay-us", "100"], ["--compute", "numpy"]]
)
def test_it_compares_and_the_answers_agree(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*QUICK, *arguments]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^2 micro-batches are \d+\.\d\dx as fast as the whole batch", printed, re.M)


def test_answers_that_differ_fail() -> None:
    assert main([*QUICK, "--layer-us", "0", "--tolerance", "0"]) == 1


def test_mistakes_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--micro-batches", "1"])
    assert "--micro-batches must be from 2 to 32" in capsys.readouterr().err


def test_the_proxy_holds_bytes_back_and_keeps_their_order() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with delay_proxy(address, 50_000) as proxied:
            host, port = proxied.split(":")
            with socket.create_connection((host, int(port))) as near:
                far, _ = listener.accept()
                with far:
                    started = time.perf_counter()
                    near.sendall(bytes(range(200)))
                    near.shutdown(socket.SHUT_WR)
                    received = bytearray()
                    while data := far.recv(64):
                        received += data
                    assert time.perf_counter() - started >= 0.05
                    assert received == bytes(range(200))
                    far.sendall(b"back")
                    assert near.recv(64) == b"back"
                    assert time.perf_counter() - started >= 0.1
