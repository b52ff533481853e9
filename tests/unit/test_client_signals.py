"""Ctrl-C while a thread drives a call: noted, and raised once it is out."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import pytest

from octavo_client import _call
from octavo_client._signals import Interrupts, others_may_raise
from tests.unit.client_fakes import fake_server

LOOP = """
import sys, numpy as np
from octavo_client import Client
q, k = np.zeros((1, 4, 8), np.float16), np.zeros((1, 2, 8), np.float16)
with Client(sys.argv[1]) as client:
    session = client.open_session("tiny")
    session.decode(0, q, k, k)
    print("ready", flush=True)
    while True:
        session.decode(0, q, k, k)
"""


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@contextmanager
def handling(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def interrupted(wake: Any = None, *, is_early: bool = False, then: Any = lambda: None) -> None:
    """Interrupt a block; STEPS has how far it went."""
    STEPS.clear()
    with Interrupts() as interrupts:
        if is_early:
            interrupt()
        if wake is not None:
            interrupts.waits_for(wake)
        if not is_early:
            interrupt()
        then()
        STEPS.append("went on")
    STEPS.append("not reached")


STEPS: list[str] = []


def test_ctrl_c_is_raised_after_the_block() -> None:
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert STEPS == ["went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_the_block_waits_for_is_ended() -> None:
    is_ended = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        interrupted(is_ended.set, then=lambda: is_ended.wait(10))
    assert is_ended.is_set()
    late: list[bool] = []
    with pytest.raises(KeyboardInterrupt):
        interrupted(lambda: late.append(True), is_early=True)
    assert late == [True]


def test_other_threads_are_left_alone() -> None:
    found: list[Any] = []

    def look() -> None:
        with Interrupts():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [signal.default_int_handler]


def test_handlers_that_may_raise_are_seen() -> None:
    assert not others_may_raise()
    with handling(signal.SIGALRM, lambda *_: None):
        assert others_may_raise()
    with handling(signal.SIGINT, mine := lambda *_: None):
        assert others_may_raise()
        with Interrupts():
            assert signal.getsignal(signal.SIGINT) is mine
    with handling(signal.SIGINT, signal.SIG_IGN):
        assert not others_may_raise()


def test_a_program_with_handlers_gets_the_public_call() -> None:
    with fake_server() as server, handling(signal.SIGTERM, lambda *_: None):
        channel = grpc.insecure_channel(server.target)
        call = _call.open_call(channel, "/octavo.v1.OctavoService/Decode")
        assert isinstance(call, _call.QueuedCall)
        call.cancel()
        channel.close()


def test_ctrl_c_ends_a_program_that_decodes() -> None:
    with fake_server() as server:
        for _ in range(4):
            program = subprocess.Popen(
                [sys.executable, "-c", LOOP, server.target],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            assert program.stdout is not None
            assert program.stdout.readline() == "ready\n"
            program.send_signal(signal.SIGINT)
            _, errors = program.communicate(timeout=30)
            assert "KeyboardInterrupt" in errors
